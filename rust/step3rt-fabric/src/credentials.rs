//! Who is at the other end of a Unix socket, as the kernel says.

#![allow(unsafe_code, reason = "one system call without a sound safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags};

/// The process that called `connect` or `listen` at the other end.
pub(crate) struct PeerCredentials {
    /// None when it lives in a process namespace that this process cannot see into, as between
    /// containers of one pod.
    pub(crate) process: Option<Pid>,
    pub(crate) user: u32,
}

impl PeerCredentials {
    /// `SO_PEERCRED`. (`rustix::net::sockopt::socket_peercred` 1.1 returns a process id that cannot
    /// be 0, which is undefined behaviour between process namespaces, where it is 0.)
    pub(crate) fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut found = libc::ucred {
            pid: 0,
            uid: u32::MAX,
            gid: u32::MAX,
        };
        let mut len = libc::socklen_t::try_from(size_of_val(&found)).expect("a few bytes");
        // SAFETY: both pointers are to locals that outlive the call, and `len` is the size of what
        // the first points to; every bit pattern is a valid `ucred`.
        let status = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut found).cast(),
                &raw mut len,
            )
        };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            process: Pid::from_raw(found.pid),
            user: found.uid,
        })
    }

    /// A descriptor that becomes readable when the process ends. None where the kernel or a process
    /// namespace denies it.
    pub(crate) fn watch_process(&self) -> Option<OwnedFd> {
        rustix::process::pidfd_open(self.process?, PidfdFlags::empty()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_of_a_socket_pair_is_this_process() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let peer = PeerCredentials::of(&socket).unwrap();
        assert_eq!(peer.process, Some(rustix::process::getpid()));
        assert_eq!(peer.user, rustix::process::geteuid().as_raw());
        assert!(peer.watch_process().is_some());
    }

    #[test]
    fn what_is_no_socket_has_no_peer() {
        assert!(PeerCredentials::of(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
