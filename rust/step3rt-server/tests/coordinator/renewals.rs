//! Certificates that are renewed while the coordinator serves: new connections see them, others do
//! not notice.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use step3rt_proto::v1;
use step3rt_proto::v1::inference_service_client::InferenceServiceClient;
use step3rt_proto::v1::node_service_client::NodeServiceClient;
use step3rt_proto::{MAX_RECEIVED_MESSAGE_BYTES, channel};
use step3rt_tls::{Identity, TlsFiles};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tonic::transport::{Channel, Endpoint};

use crate::certs::Authority;
pub(crate) use crate::certs::{GOOD, Wish};
use crate::cluster::{Cluster, collect, eventually, request};
use crate::node::{NodeOptions, TestNode, connect_by, continuation, hello};

/// As good, and another certificate with another key.
pub(crate) const OTHER: Wish = Wish {
    name: "other",
    ..GOOD
};

/// What clients send first: the head of a record that never ends.
const HALF_A_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00";

/// Files that a coordinator is given and that are then replaced, with the CA that issues them.
pub(crate) struct Member {
    pub(crate) authority: Authority,
    pub(crate) files: TlsFiles,
    /// As the files are at first; a client's and an instance's, too.
    pub(crate) identity: Identity,
    _directory: TempDir,
}

impl Member {
    pub(crate) fn new(wish: Wish) -> Self {
        let (authority, directory) = (Authority::new(), tempfile::tempdir().expect("a directory"));
        let issued = authority.issue(wish);
        let at = |name| directory.path().join(name);
        let files = TlsFiles {
            cert: at("cert.pem"),
            key: at("key.pem"),
            ca: at("ca.pem"),
        };
        let member = Self {
            identity: Identity::load(issued.clone()).expect("good"),
            authority,
            files,
            _directory: directory,
        };
        member.replace(&issued);
        member
    }

    pub(crate) fn replace(&self, by: &TlsFiles) {
        for (to, from) in [
            (&self.files.cert, &by.cert),
            (&self.files.key, &by.key),
            (&self.files.ca, &by.ca),
        ] {
            fs::copy(from, to).expect("copied");
        }
    }

    pub(crate) fn configure(&self, settings: &mut Value) {
        settings["tls_cert"] = json!(self.files.cert);
        settings["tls_key"] = json!(self.files.key);
        settings["tls_ca"] = json!(self.files.ca);
    }

    /// What is in the file now.
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(&self.files.cert).expect("a certificate")
    }

    fn cluster(&self) -> Cluster {
        let mut settings = json!({});
        self.configure(&mut settings);
        Cluster::start(&settings)
    }
}

/// The certificate that a new connection to `address` is shown; `None` when it is refused.
pub(crate) async fn shown_by(
    address: SocketAddr,
    identity: &Identity,
) -> Option<CertificateDer<'static>> {
    let connector = TlsConnector::from(Arc::clone(&identity.settings().control_client));
    let socket = TcpStream::connect(address).await.expect("somebody listens");
    let name = ServerName::from(address.ip());
    let stream = connector.connect(name, socket).await.ok()?;
    let shown = stream.get_ref().1.peer_certificates()?;
    Some(shown.first()?.clone().into_owned())
}

async fn open(address: SocketAddr, identity: &Identity) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let channel = channel::connect(&endpoint, Some(identity)).await;
    channel.map_err(|error| format!("{error:?}"))
}

async fn node(cluster: &Cluster, identity: &Identity, options: NodeOptions) -> TestNode {
    let channel = open(cluster.control_address, identity)
        .await
        .expect("trusted");
    let session = connect_by(channel, hello(options.role)).await;
    TestNode::begin(session.expect("admitted"), options).await
}

#[tokio::test]
async fn a_stream_goes_on_while_new_connections_see_the_renewed_certificate() {
    let member = Member::new(GOOD);
    let cluster = member.cluster();
    let _ffn = node(&cluster, &member.identity, NodeOptions::ffn()).await;
    let slow = NodeOptions {
        step_delay: Duration::from_millis(15),
        ..NodeOptions::attention()
    };
    let _attention = node(&cluster, &member.identity, slow).await;
    let public = open(cluster.address, &member.identity)
        .await
        .expect("trusted");
    let mut client =
        InferenceServiceClient::new(public).max_decoding_message_size(MAX_RECEIVED_MESSAGE_BYTES);
    eventually("a cluster that serves", async || {
        listed(&cluster, &member.identity).await.is_serving
    })
    .await;
    let stream = client.generate(request(&[1, 2, 3], 450)).await;
    let stream = stream.expect("accepted").into_inner();
    let streaming = tokio::spawn(collect(stream, 1));

    let addresses = [cluster.address, cluster.control_address];
    let old = member.certificate();
    for address in addresses {
        assert_eq!(shown_by(address, &member.identity).await, Some(old.clone()));
    }
    member.replace(&member.authority.issue(OTHER));
    let new = member.certificate();
    assert_ne!(old, new);
    for address in addresses {
        eventually("the renewed certificate", async || {
            shown_by(address, &member.identity).await == Some(new.clone())
        })
        .await;
    }
    assert!(
        !streaming.is_finished(),
        "the stream was to last longer than that"
    );
    // The old connection is good for more calls, too.
    let info = client.get_model_info(v1::GetModelInfoRequest {}).await;
    assert_eq!(info.expect("served").into_inner().model, "byte_model");
    let collected = streaming.await.expect("no panic").expect("no error");
    assert_eq!(collected[0].token_ids, continuation(&[1, 2, 3], 450));
}

#[tokio::test]
async fn a_renewed_ca_admits_instances_of_the_new_one_and_keeps_out_those_of_the_old() {
    let (member, next) = (Member::new(GOOD), Authority::new());
    let cluster = member.cluster();
    let old = node(&cluster, &member.identity, NodeOptions::ffn()).await;
    // An instance of the new CA that still trusts a coordinator of the old one.
    let files = next.issue(OTHER);
    let both = [&member.files.ca, &files.ca].map(|path| fs::read(path).expect("a file"));
    let bundle = member.files.ca.with_file_name("both.pem");
    fs::write(&bundle, both.concat()).expect("written");
    let newcomer = Identity::load(TlsFiles {
        ca: bundle.clone(),
        ..files.clone()
    });
    let newcomer = newcomer.expect("good");
    let refused = open(cluster.control_address, &newcomer)
        .await
        .expect_err("a stranger");
    assert!(refused.contains("UnknownCa"), "{refused}");

    // First both CAs are good, so that instances may change one by one,
    fs::copy(&bundle, &member.files.ca).expect("copied");
    eventually("an admitted instance", async || {
        open(cluster.control_address, &newcomer).await.is_ok()
    })
    .await;
    let _attention = node(&cluster, &newcomer, NodeOptions::attention()).await;
    open(cluster.control_address, &member.identity)
        .await
        .expect("still trusted");

    // then the new one alone.
    member.replace(&files);
    eventually("the end of the old CA", async || {
        open(cluster.control_address, &member.identity)
            .await
            .is_err()
    })
    .await;
    open(cluster.control_address, &newcomer)
        .await
        .expect("trusted");
    // Whoever is in stays in.
    let instances = listed(&cluster, &newcomer).await.instances;
    assert_eq!(instances.len(), 2, "{instances:?}");
    old.crash();
}

/// What there is of the cluster.
async fn listed(cluster: &Cluster, identity: &Identity) -> v1::ListInstancesResponse {
    let channel = open(cluster.control_address, identity).await;
    let mut client = NodeServiceClient::new(channel.expect("trusted"));
    let listed = client.list_instances(v1::ListInstancesRequest {}).await;
    listed.expect("listed").into_inner()
}

#[tokio::test]
async fn handshakes_that_stall_delay_nobody_and_no_renewal() {
    let member = Member::new(GOOD);
    let cluster = member.cluster();
    let stall = async |count: usize| {
        let mut stalled = Vec::new();
        for address in [cluster.address, cluster.control_address] {
            for index in 0..count {
                let mut socket = TcpStream::connect(address).await.expect("accepted");
                if index % 2 == 0 {
                    socket.write_all(HALF_A_HELLO).await.expect("sent");
                }
                stalled.push(socket);
            }
        }
        stalled
    };
    let addresses = [cluster.address, cluster.control_address];
    let stalled = stall(100).await;
    for address in addresses {
        let shown = shown_by(address, &member.identity).await;
        assert_eq!(shown, Some(member.certificate()));
    }
    // All of them still wait: nobody was served because they had been hung up on.
    for socket in &stalled {
        let error = socket.try_read(&mut [0]).expect_err("nothing is sent");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
    member.replace(&member.authority.issue(OTHER));
    let new = member.certificate();
    for address in addresses {
        eventually("the renewed certificate", async || {
            let _more = stall(5).await;
            shown_by(address, &member.identity).await == Some(new.clone())
        })
        .await;
    }
}
