//! See `step3rt_server::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("chat", step3rt_server::fuzz);
