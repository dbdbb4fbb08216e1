//! See `step3rt_proto::fuzz`.
#![no_main]

step3rt_fuzz::fuzzer!("wire", step3rt_proto::fuzz);
