//! A coordinator in this process, on free ports, and what tests do with it.

use std::net::SocketAddr;
use std::time::Duration;

use step3rt_proto::v1;
use step3rt_proto::v1::generate_request::Prompt;
use step3rt_proto::v1::generate_response::Event;
use step3rt_proto::v1::inference_service_client::InferenceServiceClient;
use step3rt_proto::v1::node_service_client::NodeServiceClient;
use step3rt_server::config::CoordinatorConfig;
use step3rt_server::coordinator::Coordinator;
use step3rt_server::shutdown::StopSignal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::node::{NodeOptions, TestNode};

/// Nothing in these tests takes this long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/byte_model");

pub(crate) struct Cluster {
    pub(crate) address: SocketAddr,
    pub(crate) control_address: SocketAddr,
    pub(crate) stop: mpsc::Sender<StopSignal>,
    pub(crate) exit: JoinHandle<u8>,
}

impl Cluster {
    /// A coordinator with `settings` on top of the test's defaults.
    pub(crate) fn start(settings: &serde_json::Value) -> Self {
        let mut json = serde_json::json!({
            "model_path": MODEL,
            "listen": "127.0.0.1:0",
            "control_listen": "127.0.0.1:0",
            // Who crashes is missed at once, since its stream breaks. So these run out where a test
            // is about them alone, and not on a machine that is busy.
            "lease_ms": 10_000,
            "step_timeout_ms": 10_000,
            "recovery_timeout_ms": 20_000,
            "num_lanes": 2,
            "max_tokens_per_micro_batch": 64,
            "block_size_tokens": 16,
        });
        for (key, value) in settings.as_object().expect("an object") {
            json[key] = value.clone();
        }
        let config = CoordinatorConfig::from_json(&json.to_string()).expect("valid");
        let coordinator = Coordinator::bind(config).expect("binds");
        let (address, control_address) = (
            coordinator.address().expect("bound"),
            coordinator.control_address().expect("bound"),
        );
        let (stop, stops) = mpsc::channel(4);
        let exit = tokio::spawn(async move { coordinator.serve(stops).await.expect("starts") });
        Self {
            address,
            control_address,
            stop,
            exit,
        }
    }

    /// A coordinator with one instance of each role that serves.
    pub(crate) async fn serving(settings: &serde_json::Value) -> (Self, TestNode, TestNode) {
        let cluster = Self::start(settings);
        let ffn = cluster.node(NodeOptions::ffn()).await;
        let attention = cluster.node(NodeOptions::attention()).await;
        cluster.wait_serving(true).await;
        (cluster, attention, ffn)
    }

    pub(crate) async fn node(&self, options: NodeOptions) -> TestNode {
        TestNode::start(self.control_address, options).await
    }

    pub(crate) async fn client(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::connect(format!("http://{}", self.address))
            .await
            .expect("the public listener accepts")
    }

    pub(crate) async fn health(&self, service: &str) -> ServingStatus {
        let channel = Channel::from_shared(format!("http://{}", self.address))
            .expect("an address")
            .connect()
            .await
            .expect("the public listener accepts");
        let mut client = HealthClient::new(channel);
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let response: HealthCheckResponse =
            client.check(request).await.expect("known").into_inner();
        response.status()
    }

    pub(crate) async fn wait_serving(&self, expected: bool) {
        let expected = if expected {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        eventually("health", async || {
            self.health(step3rt_proto::INFERENCE_SERVICE_NAME).await == expected
        })
        .await;
    }

    pub(crate) async fn instances(&self) -> v1::ListInstancesResponse {
        NodeServiceClient::connect(format!("http://{}", self.control_address))
            .await
            .expect("the control listener accepts")
            .list_instances(v1::ListInstancesRequest {})
            .await
            .expect("lists")
            .into_inner()
    }

    /// Waits until every KV block is free again.
    pub(crate) async fn wait_blocks_free(&self) {
        eventually("free blocks", async || {
            self.instances()
                .await
                .instances
                .iter()
                .all(|info| info.num_free_kv_blocks == info.num_kv_blocks)
        })
        .await;
    }

    /// Stops in good order and returns the exit code.
    pub(crate) async fn stop(self) -> u8 {
        self.stop
            .send(StopSignal::Terminate)
            .await
            .expect("still running");
        timeout(PATIENCE, self.exit)
            .await
            .expect("stops in time")
            .expect("no panic")
    }
}

pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !is_so().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}: not in time"));
}

/// A greedy request for `max_tokens` tokens after `prompt`.
pub(crate) fn request(prompt: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: prompt.into() })),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.0),
            ..Default::default()
        }),
        stopping: Some(v1::StoppingCriteria {
            max_tokens: Some(max_tokens),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Everything that one continuation was told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Collected {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<v1::TokenLogprob>,
    pub(crate) prompt_logprobs: Vec<v1::TokenLogprob>,
    pub(crate) finished: Option<v1::Finished>,
}

/// Reads a stream to its end and checks its grammar on the way: Started first and once, deltas
/// without a gap, Finished last and once per index.
pub(crate) async fn collect(
    mut stream: Streaming<v1::GenerateResponse>,
    n: usize,
) -> Result<Vec<Collected>, Status> {
    let mut collected = vec![Collected::default(); n];
    let mut is_started = false;
    let mut next_prompt_offset = 0;
    while let Some(response) = timeout(PATIENCE, stream.message())
        .await
        .expect("in time")?
    {
        match response.event.expect("an event") {
            Event::Started(_) => assert!(!std::mem::replace(&mut is_started, true)),
            Event::Delta(delta) => {
                assert!(is_started, "Started comes first");
                let entry = &mut collected[delta.index as usize];
                assert!(entry.finished.is_none(), "Finished is last");
                if delta.prompt_logprobs.is_empty() {
                    let position = u64::try_from(entry.token_ids.len()).expect("short");
                    assert!(delta.token_ids.is_empty() || delta.sequence == position);
                } else {
                    assert_eq!(delta.prompt_offset, next_prompt_offset);
                    next_prompt_offset +=
                        u32::try_from(delta.prompt_logprobs.len()).expect("short");
                }
                entry.token_ids.extend(delta.token_ids);
                entry.text.push_str(&delta.text);
                entry.logprobs.extend(delta.logprobs);
                entry.prompt_logprobs.extend(delta.prompt_logprobs);
            }
            Event::Finished(finished) => {
                let entry = &mut collected[finished.index as usize];
                assert!(entry.finished.replace(finished).is_none());
            }
        }
    }
    Ok(collected)
}

/// Runs a request with one continuation to its end.
pub(crate) async fn generate(
    client: &mut InferenceServiceClient<Channel>,
    request: v1::GenerateRequest,
) -> Result<Collected, Status> {
    let stream = client.generate(request).await?.into_inner();
    Ok(collect(stream, 1).await?.remove(0))
}
