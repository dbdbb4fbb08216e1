//! `ListInstances` of a running coordinator, as JSON for `step3rt doctor`.
//!
//! It connects, asks once, and keeps nothing.

use std::time::Duration;

use serde_json::{Value, json};
use step3rt_proto::v1::node_service_client::NodeServiceClient;
use step3rt_proto::{channel, v1};
use step3rt_tls::{Identity, SetupError, TlsFiles};
use thiserror::Error;
use tokio::time::timeout;
use tonic::transport::Endpoint;

/// The coordinator does not answer.
#[derive(Debug, Error)]
pub enum ListError {
    /// Nobody there, or somebody else.
    #[error(
        "the coordinator at {address} does not answer: {reason}. Check the address and that it runs"
    )]
    Unreachable {
        /// Where it should be.
        address: String,
        /// The transport's words.
        reason: String,
    },
    /// Certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] SetupError),
    /// The operating system refuses something basic.
    #[error("the call cannot be made: {0}. Check the process's limits")]
    System(#[from] std::io::Error),
}

/// Asks the coordinator at `control_address` (`host:port`), by TLS with `tls`. Blocks for at most
/// `time_limit`.
pub fn list_instances(
    control_address: &str,
    tls: Option<TlsFiles>,
    time_limit: Duration,
) -> Result<String, ListError> {
    let tls = tls.map(Identity::load).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answer = runtime
        .block_on(async { timeout(time_limit, ask(control_address, tls.as_ref())).await })
        .unwrap_or_else(|_| Err(format!("no answer within {time_limit:?}")));
    match answer {
        Ok(response) => Ok(to_json(&response).to_string()),
        Err(reason) => Err(ListError::Unreachable {
            address: control_address.to_owned(),
            reason,
        }),
    }
}

async fn ask(
    control_address: &str,
    tls: Option<&Identity>,
) -> Result<v1::ListInstancesResponse, String> {
    let endpoint = Endpoint::from_shared(format!("http://{control_address}"))
        .map_err(|error| error.to_string())?;
    let channel = channel::connect(&endpoint, tls).await;
    let channel = channel.map_err(|error| reason(&error, error.to_string()))?;
    let mut client = NodeServiceClient::new(channel);
    let response = client.list_instances(v1::ListInstancesRequest {}).await;
    response
        .map(tonic::Response::into_inner)
        .map_err(|status| reason(&status, status.message().to_owned()))
}

/// What is wrong with TLS, if that is it, else the transport's words.
fn reason(error: &(dyn std::error::Error + 'static), text: String) -> String {
    channel::fault_of(error).map_or(text, |fault| fault.to_string())
}

fn to_json(response: &v1::ListInstancesResponse) -> Value {
    json!({
        "is_serving": response.is_serving,
        "status": response.status,
        "instances": response.instances.iter().map(instance_to_json).collect::<Vec<_>>(),
    })
}

/// A role as the command line spells it.
pub(crate) fn role_name(role: v1::Role) -> &'static str {
    match role {
        v1::Role::Attention => "attention",
        v1::Role::Ffn => "ffn",
        v1::Role::Unspecified => "unspecified",
    }
}

fn instance_to_json(info: &v1::InstanceInfo) -> Value {
    let role = role_name(info.role());
    let links: Vec<_> = info
        .links
        .iter()
        .map(|link| {
            json!({
                "peer_instance_id": link.peer_instance_id,
                "fabric": link.fabric,
                "reason": link.reason,
            })
        })
        .collect();
    json!({
        "instance_id": info.instance_id,
        "role": role,
        "role_rank": info.role_rank,
        "epoch": info.epoch,
        "pid": info.pid,
        "state": info.state,
        "status": info.status,
        "num_kv_blocks": info.num_kv_blocks,
        "num_free_kv_blocks": info.num_free_kv_blocks,
        "links": links,
    })
}
