//! Who moves the bytes, who is woken, and how long a wait lasts.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::ThreadId;
use std::time::Instant;

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// Reads a byte and says which thread did.
struct Reading {
    socket: UnixStream,
    readers: Sender<ThreadId>,
}

impl Transfer for Reading {
    fn advance(&self) {
        if (&self.socket).read(&mut [0]).is_ok() {
            self.readers.send(std::thread::current().id()).unwrap();
        }
    }
}

fn watched() -> (Arc<Sockets>, UnixStream, Receiver<ThreadId>) {
    let sockets = Arc::new(Sockets::new().unwrap());
    let (socket, peer) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let (readers, read_by) = channel();
    let fd = socket.try_clone().unwrap();
    sockets
        .add(fd, Arc::new(Reading { socket, readers }))
        .unwrap();
    (sockets, peer, read_by)
}

#[test]
fn bytes_are_moved_by_who_attends_and_by_the_thread_while_nobody_does() {
    let (sockets, mut peer, read_by) = watched();
    let own = std::thread::current().id();
    for _ in 0..20 {
        let attendance = sockets.attend().unwrap();
        peer.write_all(&[0]).unwrap();
        while !attendance.sleep(PATIENCE, || false) {}
        assert_eq!(read_by.try_recv(), Ok(own));
        drop(attendance);
        peer.write_all(&[0]).unwrap();
        assert_ne!(read_by.recv_timeout(PATIENCE).unwrap(), own);
    }
    sockets.stop();
}

#[test]
fn one_attends_at_a_time() {
    let (sockets, _peer, _read_by) = watched();
    let attendance = sockets.attend();
    assert!(attendance.is_some() && sockets.attend().is_none());
    drop(attendance);
    assert!(sockets.attend().is_some());
    sockets.stop();
}

#[test]
fn a_sleeper_is_woken_without_bytes_and_news_before_its_sleep_keep_it_awake() {
    let (sockets, _peer, _read_by) = watched();
    let started = Instant::now();
    let attendance = sockets.attend().unwrap();
    attendance.sleep(PATIENCE, || true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !sockets.is_asleep.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            sockets.wake_sleeper();
        });
        attendance.sleep(PATIENCE, || false);
    });
    assert!(started.elapsed() < PATIENCE);
    drop(attendance);
    sockets.stop();
}

#[test]
fn a_wait_lasts_at_least_its_timeout() {
    let (sockets, _peer, _read_by) = watched();
    let attendance = sockets.attend().unwrap();
    let started = Instant::now();
    attendance.sleep(Duration::from_micros(2_300), || false);
    assert!(started.elapsed() >= Duration::from_micros(2_300));
    drop(attendance);
    sockets.stop();
}
