//! See `step3rt_fabric::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("handshake", step3rt_fabric::fuzz);
