//! See `step3rt_server::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("text", step3rt_server::fuzz);
