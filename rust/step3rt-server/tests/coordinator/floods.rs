//! Clients that send much and finish nothing: what the coordinator holds of it, measured.

use std::fs;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::Duration;

use h2::client::{ResponseFuture, SendRequest, handshake};
use h2::{Reason, SendStream};
use step3rt_proto::v1::GetModelInfoRequest;
use step3rt_proto::v1::inference_service_client::InferenceServiceClient;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::codegen::Bytes;
use tonic::codegen::http::{HeaderMap, Request};

use crate::cluster::PATIENCE;
use crate::process::{Guard, child_command, read_ready_file};

const MIB: usize = 1024 * 1024;
/// Of one connection, beside what every request may hold.
const MAX_HELD_BYTES: usize = 128 * MIB;

/// Sends the beginning of a message of 32 MiB: all but its last MiB, or as much as is taken.
async fn send_most(
    mut connection: SendRequest<Bytes>,
    address: SocketAddr,
) -> (ResponseFuture, SendStream<Bytes>) {
    poll_fn(|context| connection.poll_ready(context))
        .await
        .expect("connected");
    let request = Request::post(format!(
        "http://{address}/step3rt.v1.InferenceService/Generate"
    ))
    .header("content-type", "application/grpc")
    .header("te", "trailers")
    .body(())
    .expect("valid");
    let (response, mut stream) = connection.send_request(request, false).expect("sent");
    let mut prefix = vec![0];
    prefix.extend(u32::try_from(32 * MIB).expect("fits").to_be_bytes());
    stream.send_data(prefix.into(), false).expect("room");
    let mut rest = Bytes::from(vec![0; 31 * MIB]);
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        let Some(Ok(num_bytes)) = poll_fn(|context| stream.poll_capacity(context)).await else {
            break;
        };
        let sent = stream.send_data(rest.split_to(num_bytes), false);
        if sent.is_err() {
            break;
        }
    }
    (response, stream)
}

/// The error of a call, if it has one already.
async fn refusal(response: ResponseFuture) -> Option<HeaderMap> {
    let answered = timeout(Duration::from_millis(200), response).await;
    Some(answered.ok()?.expect("answered").headers().clone())
}

fn peak_bytes(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let digits = line.and_then(|line| line.split_whitespace().nth(1));
    1024 * digits
        .expect("kibibytes")
        .parse::<usize>()
        .expect("a number")
}

#[expect(clippy::print_stdout, reason = "the figure is in docs/protocol.md")]
#[tokio::test]
async fn messages_that_are_never_complete_hold_a_bounded_amount_of_memory() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let ready_file = directory.path().join("ready.json");
    let child = Guard(child_command(&ready_file, "json").spawn().expect("spawns"));
    let addresses = read_ready_file(&ready_file);
    let address = addresses["address"].as_str().expect("text");
    let address: SocketAddr = address.parse().expect("an address");
    let before = peak_bytes(child.0.id());

    let socket = TcpStream::connect(address).await.expect("listens");
    let (flood, connection) = handshake(socket).await.expect("HTTP/2");
    tokio::spawn(connection);
    let sending = (0..12).map(|_| tokio::spawn(send_most(flood.clone(), address)));
    let sending: Vec<_> = sending.collect();
    let mut num_refused = 0;
    let mut held = Vec::new();
    for sent in sending {
        let sent = timeout(3 * PATIENCE, sent).await.expect("in time");
        let (response, stream) = sent.expect("no panic");
        if let Some(refusal) = refusal(response).await {
            assert_eq!(refusal["grpc-status"], "8", "{refusal:?}");
            num_refused += 1;
        } else {
            held.push(stream);
        }
    }
    let grown = peak_bytes(child.0.id()) - before;
    println!(
        "{} held and {num_refused} refused: {} MiB",
        held.len(),
        grown / MIB
    );
    assert!(held.len() >= 3 && num_refused >= 7, "{}", held.len());
    assert!(grown < MAX_HELD_BYTES + 48 * MIB, "{} MiB", grown / MIB);

    // Others are served meanwhile, and so is that client when it has given up.
    let url = format!("http://{address}");
    let mut other = InferenceServiceClient::connect(url).await.expect("accepts");
    let info = other.get_model_info(GetModelInfoRequest {}).await;
    info.expect("served");
    for mut stream in held {
        stream.send_reset(Reason::CANCEL);
    }
    let (response, _stream) = send_most(flood, address).await;
    assert!(refusal(response).await.is_none(), "there is room again");
}
