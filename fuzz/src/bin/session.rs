//! See `step3rt_server::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("session", step3rt_server::fuzz);
