//! What the fuzzers of `fuzz/` run on bytes that a coordinator could send, and what they begin with.
//!
//! It is in the crate's tests, which replay the committed corpus, and in builds with
//! `--cfg fuzzing`; never in a release. A target panics when a promise is broken.

#[cfg(test)]
#[path = "../../../fuzz/src/replay.rs"]
mod replay;

use std::collections::BTreeSet;

use step3rt_core::step::{SamplingState, StepPlan};
use step3rt_fabric::contract::MAX_LANES;
use step3rt_proto::v1::session_response;
use step3rt_proto::{Message, v1};

use crate::dialer::{Welcome, check_welcome};
use crate::options::{CoordinatorAddress, Role};
use crate::session::{Command, command};
use crate::topology::Topology;

/// A target: its folder in `fuzz/corpus`, and what is run on its inputs.
pub type Target = (&'static str, fn(&[u8]));

/// The crate's targets.
pub const TARGETS: [Target; 1] = [("plan", plan)];

const SESSION: u8 = 0;
const ADDRESS: u8 = 1;

/// A session's responses, each behind its length; or a coordinator's address.
pub fn plan(data: &[u8]) {
    match data.split_first() {
        Some((&SESSION, data)) => session(data),
        Some((&ADDRESS, data)) => address(&String::from_utf8_lossy(data)),
        _ => {}
    }
}

fn session(mut data: &[u8]) {
    let Ok(first) = v1::SessionResponse::decode_length_delimited(&mut data) else {
        return;
    };
    let Some(session_response::Command::Welcome(welcome)) = first.command else {
        return;
    };
    let Ok(checked) = check_welcome(welcome.clone()) else {
        return;
    };
    check(&checked, &welcome);
    while let Ok(response) = <v1::SessionResponse as Message>::decode_length_delimited(&mut data) {
        match command(checked.identity(), response.clone()) {
            Ok(found) => check_command(&checked, found, response.command),
            Err(found) => return assert!(!found.is_empty()),
        }
    }
}

fn check(checked: &Welcome, welcome: &v1::Welcome) {
    assert!((1..=MAX_LANES).contains(&checked.num_lanes));
    let settings = &checked.settings;
    assert_eq!(settings.num_lanes, u32::from(checked.num_lanes));
    assert!(settings.lease_ms / 3 > 0, "heartbeats need a pause");
    assert_eq!(welcome.settings.as_ref(), Some(settings));
}

/// What was understood is all that was said, or it was not for this incarnation.
fn check_command(
    welcome: &Welcome,
    found: Option<Command>,
    said: Option<session_response::Command>,
) {
    match (found, said) {
        (Some(Command::StepPlan(plan)), Some(session_response::Command::StepPlan(said))) => {
            check_plan(&plan);
            assert_eq!(plan.key.instance, welcome.instance);
            assert_eq!(plan.key.epoch, welcome.epoch);
            assert_eq!(v1::StepPlan::from(plan), said);
        }
        (Some(Command::Topology(topology)), Some(session_response::Command::Topology(said))) => {
            let peers = topology.peers.iter();
            let instances: BTreeSet<_> = peers.map(|peer| peer.address.identity.instance).collect();
            assert_eq!(instances.len(), topology.peers.len());
            for peer in &topology.peers {
                assert_eq!(topology.find(peer.address.identity), Some(peer));
            }
            assert_eq!(to_wire(topology), said);
        }
        (Some(Command::Drain), Some(session_response::Command::Drain(_))) => {}
        (None, Some(session_response::Command::StepPlan(said))) => {
            assert_ne!(said.epoch, welcome.epoch.0);
        }
        (found, said) => panic!("{said:?} was taken for {found:?}"),
    }
}

fn check_plan(plan: &StepPlan) {
    for join in &plan.joined {
        assert!(join.num_prompt_tokens as usize <= join.tokens.len());
        let SamplingState {
            temperature,
            top_p,
            min_p,
            adjustments,
            ..
        } = &join.sampling;
        let mut numbers = vec![*temperature, *top_p, *min_p];
        if let Some(adjustments) = adjustments {
            assert!(adjustments.repetition_penalty > 0.0);
            numbers.extend([
                adjustments.presence_penalty,
                adjustments.frequency_penalty,
                adjustments.repetition_penalty,
            ]);
            numbers.extend(adjustments.logit_bias.iter().map(|(_, bias)| *bias));
        }
        assert!(
            numbers.iter().all(|number| number.is_finite()),
            "{numbers:?}"
        );
    }
}

fn to_wire(topology: Topology) -> v1::Topology {
    let peers = topology.peers.into_iter().map(|peer| v1::Peer {
        instance_id: peer.address.identity.instance.0,
        role: peer.role.to_wire().into(),
        role_rank: peer.role_rank,
        epoch: peer.address.identity.epoch.0,
        boot_id: peer.address.boot_id,
        addresses: peer
            .address
            .addresses
            .into_iter()
            .map(|address| v1::DataAddress {
                fabric: address.fabric,
                address: address.address,
            })
            .collect(),
    });
    v1::Topology {
        version: topology.version,
        peers: peers.collect(),
    }
}

/// An address that was taken is one that gRPC can be given.
fn address(text: &str) {
    let Ok(address) = CoordinatorAddress::parse(text) else {
        return;
    };
    assert_eq!(address.as_str(), text);
    if let Some(path) = text.strip_prefix("unix:") {
        assert_eq!(address.uri(), format!("unix://{path}"));
        return;
    }
    assert_eq!(address.uri(), format!("http://{text}"));
    let (host, port) = text.rsplit_once(':').expect("it has a port");
    assert!(!host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
}

/// Inputs made of messages as this build writes them, each with its target's name.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let addresses = [
        "host:1",
        "[::1]:50051",
        "unix:/run/step3rt/control.sock",
        "::1:1",
        "a b:1",
    ];
    let addresses = addresses.map(|text| [&[ADDRESS], text.as_bytes()].concat());
    let welcome = session_response::Command::Welcome(welcome());
    let topology = session_response::Command::Topology(topology());
    let drain = session_response::Command::Drain(v1::Drain {});
    let mut sessions = vec![
        vec![welcome.clone()],
        vec![welcome.clone(), topology.clone(), drain],
        vec![welcome.clone(), welcome.clone()],
        vec![topology],
    ];
    for plan in plans() {
        let plan = session_response::Command::StepPlan(plan);
        sessions.push(vec![welcome.clone(), plan.clone(), plan]);
    }
    let sessions = sessions.into_iter().map(|commands| {
        let mut seed = vec![SESSION];
        for command in commands {
            let command = Some(command);
            let response = v1::SessionResponse { command };
            seed.extend(response.encode_length_delimited_to_vec());
        }
        seed
    });
    let seeds = sessions.chain(addresses);
    seeds.map(|seed| ("plan", seed)).collect()
}

const EPOCH: u64 = 7;

fn welcome() -> v1::Welcome {
    v1::Welcome {
        instance_id: 1,
        role_rank: 0,
        epoch: EPOCH,
        settings: Some(v1::ClusterSettings {
            num_lanes: 2,
            max_tokens_per_micro_batch: 256,
            block_size_tokens: 64,
            max_model_len: 512,
            ep_size: 1,
            lease_ms: 3_000,
            compute_dtype: "float32".to_owned(),
            a2f_dtype: "float32".to_owned(),
            f2a_dtype: "float32".to_owned(),
            kv_dtype: "float32".to_owned(),
            fabric: "auto".to_owned(),
            max_steps_in_flight: 2,
            num_attention: 1,
        }),
    }
}

fn topology() -> v1::Topology {
    let peer = |instance_id, role: Role| v1::Peer {
        instance_id,
        role: role.to_wire().into(),
        role_rank: 0,
        epoch: EPOCH + u64::from(instance_id),
        boot_id: "b".to_owned(),
        addresses: vec![v1::DataAddress {
            fabric: "shm".to_owned(),
            address: "@step3rt-1-0".to_owned(),
        }],
    };
    v1::Topology {
        version: 2,
        peers: vec![peer(1, Role::Attention), peer(2, Role::Ffn)],
    }
}

/// A step of prompts, one of decodes, and one of another incarnation.
fn plans() -> [v1::StepPlan; 3] {
    let sampling = v1::SamplingState {
        temperature: 0.5,
        top_k: 3,
        top_p: 0.9,
        min_p: 0.1,
        seed: u64::MAX,
        top_logprobs: Some(0),
        prompt_logprobs: None,
        min_tokens: 1,
        stop_token_ids: vec![2],
        adjustments: Some(v1::LogitAdjustments {
            presence_penalty: -2.0,
            frequency_penalty: 0.25,
            repetition_penalty: 1.5,
            bias_token_ids: vec![0, 7],
            biases: vec![-100.0, 0.5],
        }),
    };
    let chunk = |num_computed_tokens, num_new_tokens, new_block_ids| v1::SequenceChunk {
        sequence_id: 2,
        num_computed_tokens,
        num_new_tokens,
        new_block_ids,
        samples: true,
    };
    let prompts = v1::StepPlan {
        epoch: EPOCH,
        lane: 1,
        step: 1,
        left: vec![],
        joined: vec![v1::SequenceJoin {
            sequence_id: 2,
            token_ids: vec![5, 6, 7],
            num_prompt_tokens: 2,
            sampling: Some(sampling),
        }],
        chunks: vec![chunk(0, 3, vec![0, 8])],
    };
    let decodes = v1::StepPlan {
        step: 2,
        left: vec![1],
        joined: vec![],
        chunks: vec![chunk(3, 1, vec![])],
        ..prompts.clone()
    };
    let stale = v1::StepPlan {
        epoch: EPOCH - 1,
        ..decodes.clone()
    };
    [prompts, decodes, stale]
}
