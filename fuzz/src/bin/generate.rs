//! See `step3rt_server::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("generate", step3rt_server::fuzz);
