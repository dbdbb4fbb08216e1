//! What the fuzzer begins with: sessions of a cluster that serves, and each message once.

use step3rt_proto::Message as _;
use step3rt_proto::v1;
use step3rt_proto::v1::session_request::Event as SessionEvent;

use super::messages::{failed, hello, output, ready};
use super::{
    ANSWER, ANSWER_WRONG, CANCEL, END, FAIL, HELLO, JOIN_ATTENTION, JOIN_FFN, LEAVE, LINK,
    LOSE_PEER, READY, SAY, SERVES_AT_FIRST, SUBMIT,
};

/// What the first request of a cluster that serves becomes.
fn first_plan() -> v1::StepPlan {
    v1::StepPlan {
        epoch: 8,
        lane: 0,
        step: 1,
        chunks: vec![v1::SequenceChunk {
            sequence_id: 1,
            num_new_tokens: 5,
            samples: true,
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(in crate::fuzz) fn seeds() -> Vec<Vec<u8>> {
    let said = |who: u8, event: SessionEvent| {
        let request = v1::SessionRequest { event: Some(event) };
        let bytes = request.encode_to_vec();
        let len = u8::try_from(bytes.len()).expect("short");
        [&[SAY | who << 4, len][..], &bytes].concat()
    };
    let (ffn, attention) = (0, 1 << 4);
    let plan = first_plan();
    let hello = hello(v1::Role::Attention).encode_to_vec();
    let hello_len = u8::try_from(hello.len()).expect("short");
    let heartbeat = v1::Heartbeat {
        status: "ready".to_owned(),
        last_progress_age_ms: 10,
    };
    let links = v1::LinksReady {
        topology_version: 2,
        links: vec![v1::LinkInfo {
            peer_instance_id: 1,
            fabric: "shm".to_owned(),
            reason: "both ends run on one host".to_owned(),
        }],
    };
    let lost = v1::PeerLost {
        instance_id: 1,
        epoch: 7,
        reason: "why".to_owned(),
    };
    let answer = ANSWER | attention;
    let wrong = ANSWER_WRONG | attention;
    let generation = [SUBMIT, 4, 4, answer, 7, answer, 7, answer, 2];
    let served = |acts: &[u8]| [&[SERVES_AT_FIRST], acts].concat();
    let mut seeds = vec![
        served(&generation),
        served(&[SUBMIT, 20, 0x27, answer, 0x47, answer, 0x47, answer, 0x47]),
        served(&[SUBMIT, 4, 4, FAIL | attention, answer, 7, END | attention]),
        served(&[
            SUBMIT,
            4,
            4,
            answer,
            7,
            END,
            JOIN_FFN,
            READY | 2 << 4,
            8,
            LINK | attention,
        ]),
        served(&[
            SUBMIT,
            4,
            30,
            JOIN_ATTENTION,
            READY | 2 << 4,
            8,
            LINK | 2 << 4,
            LEAVE | attention,
        ]),
        served(&[SUBMIT, 4, 4, CANCEL, answer, 7, LOSE_PEER | attention, 0]),
        served(&said(1, SessionEvent::StepOutput(output(&plan, 7)))),
        served(&said(1, SessionEvent::StepFailed(failed(&plan)))),
        served(&said(1, SessionEvent::Heartbeat(heartbeat))),
        served(&said(1, SessionEvent::LinksReady(links))),
        served(&said(1, SessionEvent::PeerLost(lost))),
        served(&said(0, SessionEvent::Ready(ready(0)))),
        [&[0, HELLO, hello_len][..], &hello, &[READY | ffn, 8, LINK]].concat(),
    ];
    for how in [0, 1, 2, 3, 4, 5, 6, 0x16, 0x26, 0x46] {
        seeds.push(served(&[SUBMIT, 4, 4, wrong, 7, how, answer, 7]));
    }
    seeds
}
