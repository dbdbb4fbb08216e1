//! See `step3rt_node::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("plan", step3rt_node::fuzz);
