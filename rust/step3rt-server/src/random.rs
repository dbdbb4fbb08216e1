//! Random numbers from the kernel: seeds and error ids.
//!
//! Nothing that decides a schedule may use it.

/// A random number.
pub fn u64() -> u64 {
    getrandom::u64().expect("the kernel gives random numbers once it has booted")
}
