//! The coordinator as a process of its own: signals, the service manager's socket and its sockets.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use step3rt_proto::v1::GetModelInfoRequest;
use step3rt_proto::v1::inference_service_client::InferenceServiceClient;
use step3rt_tls::identity::LOOK_INTERVAL;

use crate::cluster::{MODEL, PATIENCE};
use crate::renewals::{GOOD, Member, OTHER, shown_by};

const CONFIG_ENV: &str = "STEP3RT_TEST_CONFIG";

/// Not a test by itself: the others run it in a child process.
#[test]
#[ignore = "the body of the child process of the tests below"]
fn coordinator_process() {
    let config = std::env::var(CONFIG_ENV).expect("set by the parent");
    assert_eq!(step3rt_server::run(&config).expect("starts"), 0);
}

fn config(ready_file: &Path, log_format: &str) -> serde_json::Value {
    json!({
        "model_path": MODEL,
        "listen": "127.0.0.1:0",
        "control_listen": "127.0.0.1:0",
        "ready_file": ready_file,
        "log_format": log_format,
    })
}

/// A process learns its number, and the stream that the journal reads, when it has them.
const LIKE_A_SERVICE: &str = r#"LISTEN_PID=$$
if [ -n "$IS_JOURNAL" ]; then JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2); fi
export LISTEN_PID JOURNAL_STREAM
exec "$0" "$@" 3<&0"#;

/// What `exec` of this test binary with the body above looks like to a shell.
pub(crate) fn child_command(ready_file: &Path, log_format: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", LIKE_A_SERVICE])
        .arg(std::env::current_exe().expect("known"))
        .args(["--ignored", "--exact", "process::coordinator_process"])
        .env(CONFIG_ENV, config(ready_file, log_format).to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .stdin(Stdio::null());
    command
}

/// Kills the child if the test fails before it has ended.
pub(crate) struct Guard(pub(crate) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guard {
    fn terminate(&self) {
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Waits for a good end and returns what was logged.
    fn wait_success(&mut self) -> String {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(status) = self.0.try_wait().expect("a child") {
                assert!(status.success(), "{status}");
                let mut log = String::new();
                let mut stderr = self.0.stderr.take().expect("piped");
                stderr.read_to_string(&mut log).expect("text");
                return log;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the child did not end");
    }
}

pub(crate) fn read_ready_file(path: &Path) -> serde_json::Value {
    let started = Instant::now();
    loop {
        if let Ok(text) = std::fs::read_to_string(path) {
            return serde_json::from_str(&text).expect("complete");
        }
        assert!(started.elapsed() < PATIENCE, "no ready file");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_service_manager_hears_ready_status_watchdog_and_stopping() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let notify_path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&notify_path).expect("binds");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    let ready_file = directory.path().join("ready.json");
    let mut command = child_command(&ready_file, "json");
    command
        .env("NOTIFY_SOCKET", &notify_path)
        .env("WATCHDOG_USEC", "400000");
    let mut child = Guard(command.spawn().expect("spawns"));
    let mut heard = String::new();
    let mut hear_until = |end: &str, times: usize| {
        while heard.matches(end).count() < times {
            let mut datagram = [0; 4_096];
            let length = socket.recv(&mut datagram).expect("speaks in time");
            heard.push_str(std::str::from_utf8(&datagram[..length]).expect("text"));
            heard.push('\n');
        }
        heard.clone()
    };
    hear_until("READY=1", 1);
    let started = Instant::now();
    let text = hear_until("WATCHDOG=1", 4);
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "fed twice per period"
    );
    assert!(text.contains("STATUS=waiting for instances"), "{text}");
    child.terminate();
    let text = hear_until("STOPPING=1", 1);
    assert!(text.find("READY=1") < text.find("STOPPING=1"));
    let log = child.wait_success();
    assert!(!ready_file.exists());
    let is_json = |line| serde_json::from_str::<serde_json::Value>(line).is_ok();
    assert!(
        log.contains("the coordinator listens") && log.lines().all(is_json),
        "{log}"
    );
}

#[test]
fn a_socket_passed_by_the_service_manager_is_served() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let address: SocketAddr = listener.local_addr().expect("bound");
    let directory = tempfile::tempdir().expect("temporary directory");
    let ready_file = directory.path().join("ready.json");
    let mut command = child_command(&ready_file, "text");
    command
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .env("LISTEN_FDS", "1")
        .env("IS_JOURNAL", "1");
    let mut child = Guard(command.spawn().expect("spawns"));
    // The socket exists before the coordinator does: nobody is refused. The runtime goes with its
    // connection, which nobody would close while this thread waits for the child.
    let info = tokio::runtime::Runtime::new()
        .expect("starts")
        .block_on(async {
            InferenceServiceClient::connect(format!("http://{address}"))
                .await
                .expect("connects")
                .get_model_info(GetModelInfoRequest {})
                .await
                .expect("answers")
                .into_inner()
        });
    assert_eq!(info.model, "byte_model");
    let ready = read_ready_file(&ready_file);
    assert_eq!(ready["address"], address.to_string());
    child.terminate();
    let log = child.wait_success();
    assert!(log.contains("<6>the coordinator listens"), "{log}");
    assert!(log.lines().all(|line| line.starts_with('<')), "{log}");
}

#[test]
fn a_renewal_of_no_use_is_logged_once_and_the_certificate_kept_until_it_is_put_right() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let ready_file = directory.path().join("ready.json");
    let member = Member::new(GOOD);
    let mut config = config(&ready_file, "text");
    member.configure(&mut config);
    let mut command = child_command(&ready_file, "text");
    let mut child = Guard(
        command
            .env(CONFIG_ENV, config.to_string())
            // Inherited: the journal does not read this one's lines.
            .env("JOURNAL_STREAM", "1:2")
            .spawn()
            .expect("spawns"),
    );
    let ready = read_ready_file(&ready_file);
    let addresses = ["address", "control_address"].map(|key| {
        let address = ready[key].as_str().expect("text");
        address.parse::<SocketAddr>().expect("an address")
    });
    let runtime = tokio::runtime::Runtime::new().expect("starts");
    let shown = || addresses.map(|address| runtime.block_on(shown_by(address, &member.identity)));
    let old = member.certificate();
    assert_eq!(shown(), [Some(old.clone()), Some(old.clone())]);

    let next = member.authority.issue(OTHER);
    std::fs::copy(&next.cert, &member.files.cert).expect("copied");
    // The second look says what is wrong, and those that follow say nothing more.
    std::thread::sleep(LOOK_INTERVAL * 6);
    assert_eq!(shown(), [Some(old.clone()), Some(old.clone())]);
    std::fs::copy(&next.key, &member.files.key).expect("copied");
    let new = member.certificate();
    let started = Instant::now();
    while shown() != [Some(new.clone()), Some(new.clone())] {
        assert!(
            started.elapsed() < PATIENCE,
            "the renewed certificate is not used"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    child.terminate();
    let log = child.wait_success();
    let warning = "the renewed TLS files cannot be used: tls_key = ";
    assert_eq!(log.matches(warning).count(), 1, "{log}");
    assert_eq!(log.matches("WARN").count(), 1, "{log}");
    assert_eq!(
        log.matches("new connections go by the renewed tls_cert = ")
            .count(),
        1,
        "{log}"
    );
}
