//! Prints the memory that messages of the largest size take which hold nothing but the elements of one
//! list: with prost alone, and behind the limits of `step3rt_proto::codec`. Then what those limits cost
//! ordinary requests, as a ratio within one run.
//!
//! `cargo run --release -p step3rt-proto --example decode_peak`
#![allow(clippy::print_stdout, reason = "it is a report")]

use std::hint::black_box;
use std::time::{Duration, Instant};
use std::{env, error, fs, process};

use prost::encoding::encode_varint;
use step3rt_proto::codec::{self, Bounded};
use step3rt_proto::{MAX_CONTROL_MESSAGE_BYTES, MAX_RECEIVED_MESSAGE_BYTES, Message, v1};

/// A list, what its message begins with, and an element of it.
type Case = (&'static str, Vec<u8>, Vec<u8>);

fn main() -> Result<(), Box<dyn error::Error>> {
    if let [_, number, way] = &env::args().collect::<Vec<_>>()[..] {
        let number: usize = number.parse()?;
        if number < client_cases().len() {
            let cases = client_cases();
            take::<v1::GenerateRequest>(&cases[number], MAX_RECEIVED_MESSAGE_BYTES, way);
        } else {
            let case = &member_cases()[number - client_cases().len()];
            take::<v1::SessionResponse>(case, MAX_CONTROL_MESSAGE_BYTES, way);
        }
        println!("{}", peak_mib()?);
        return Ok(());
    }
    println!("| list | message, MiB | prost alone, peak MiB | bounded, peak MiB |");
    println!("| --- | ---: | ---: | ---: |");
    let names = client_cases().into_iter().chain(member_cases());
    for (number, (name, ..)) in names.enumerate() {
        let is_client = number < client_cases().len();
        let largest = if is_client {
            MAX_RECEIVED_MESSAGE_BYTES
        } else {
            MAX_CONTROL_MESSAGE_BYTES
        };
        let [prost, bounded] = ["prost", "bounded"].map(|way| in_child(number, way));
        println!("| {name} | {} | {} | {} |", largest >> 20, prost?, bounded?);
    }
    compare("64 token ids", &request(64));
    compare("4,096 token ids", &request(4_096));
    compare("65,536 token ids", &request(65_536));
    Ok(())
}

/// `GenerateRequest`: field 6 `media`, 8.3 `stop`, 8.4 `stop_token_ids`, 4.1 and 11.1 token ids,
/// 7.10 `logit_bias`, 7.14.1 `choices`.
fn client_cases() -> Vec<Case> {
    vec![
        ("media, empty", vec![], vec![0x32, 0]),
        ("stop, empty", vec![0x42], vec![0x1a, 0]),
        ("stop, a byte each", vec![0x42], vec![0x1a, 1, b'x']),
        ("stop_token_ids, unpacked", vec![0x42], vec![0x20, 0]),
        ("token_ids, packed", vec![0x22, 0x0a], vec![1]),
        ("choices, empty", vec![0x3a, 0x72], vec![0x0a, 0]),
    ]
}

/// `SessionResponse`: 3 is the plan; its 4 `left`, 5 `joined`, 6 `chunks`.
fn member_cases() -> Vec<Case> {
    vec![
        ("left, packed", vec![0x1a, 0x22], vec![1]),
        ("joined, empty", vec![0x1a], vec![0x2a, 0]),
        (
            "joined with sampling, empty",
            vec![0x1a],
            vec![0x2a, 2, 0x22, 0],
        ),
        ("chunks, empty", vec![0x1a], vec![0x32, 0]),
    ]
}

/// Decodes a message of `largest` bytes.
fn take<T: Bounded>((_, keys, element): &Case, largest: usize, way: &str) {
    let mut wire = element.repeat((largest - 32) / element.len());
    for key in keys.iter().rev() {
        let mut outer = vec![*key];
        let num_bytes = u64::try_from(wire.len()).expect("it is in memory");
        encode_varint(num_bytes, &mut outer);
        outer.append(&mut wire);
        wire = outer;
    }
    match way {
        "prost" => drop(black_box(<T as Message>::decode(&wire[..]))),
        _ => drop(black_box(codec::decode::<T>(&wire[..]))),
    }
}

fn in_child(number: usize, way: &str) -> Result<String, Box<dyn error::Error>> {
    let child = process::Command::new(env::current_exe()?)
        .args([&number.to_string(), way])
        .output()?;
    let text = String::from_utf8(child.stdout)?;
    Ok(if child.status.success() {
        text.trim().to_owned()
    } else {
        format!("{}", child.status)
    })
}

/// The most memory that this process had.
fn peak_mib() -> Result<u64, Box<dyn error::Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.ok_or("no VmHWM")?.parse::<u64>()? >> 10)
}

/// A prompt of ids as a vocabulary of 128 Ki has them.
fn request(num_tokens: u32) -> Vec<u8> {
    let ids = (0..num_tokens).map(|position| position.wrapping_mul(2_654_435_761) % 131_072);
    v1::GenerateRequest {
        request_id: "compare".to_owned(),
        prompt: Some(v1::generate_request::Prompt::TokenIds(v1::TokenIds {
            ids: ids.collect(),
        })),
        ..Default::default()
    }
    .encode_to_vec()
}

/// Times both ways by turns.
fn compare(name: &str, wire: &[u8]) {
    let num_bytes = u32::try_from(wire.len()).expect("far below the limit");
    let rounds = 200_000_000 / (num_bytes * 100 + 10_000);
    let mut best = [Duration::MAX; 2];
    for _ in 0..20 {
        let started = Instant::now();
        for _ in 0..rounds {
            drop(black_box(v1::GenerateRequest::decode(black_box(wire))));
        }
        best[0] = best[0].min(started.elapsed());
        let started = Instant::now();
        for _ in 0..rounds {
            let decoded = codec::decode::<v1::GenerateRequest>(black_box(wire));
            drop(black_box(decoded));
        }
        best[1] = best[1].min(started.elapsed());
    }
    let each = |time: Duration| time.as_secs_f64() / f64::from(rounds) * 1e6;
    let [prost, bounded] = best.map(each);
    println!(
        "{name}: {prost:.3} µs with prost alone, {bounded:.3} µs bounded, ratio {:.3}",
        bounded / prost
    );
}
