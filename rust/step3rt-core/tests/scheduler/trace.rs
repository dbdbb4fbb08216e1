//! A readable trace of plans: one small history that has a bit of everything.

use std::fmt::Write;

use step3rt_core::ids::RequestId;
use step3rt_core::scheduler::Event;
use step3rt_core::step::StepPlan;

use crate::world::{World, config, request};

fn note(trace: &mut String, plans: &[StepPlan]) {
    for plan in plans {
        let key = plan.key;
        write!(trace, "i{} lane{} step{}", key.instance, key.lane, key.step).expect("a string");
        for id in &plan.left {
            write!(trace, " | left s{id}").expect("a string");
        }
        for join in &plan.joined {
            let (id, known) = (join.sequence, join.tokens.len());
            write!(trace, " | join s{id} ({known} known)").expect("a string");
        }
        for chunk in &plan.chunks {
            let (id, start) = (chunk.sequence, chunk.num_computed_tokens);
            let end = start + chunk.num_new_tokens;
            let samples = if chunk.samples { " sample" } else { "" };
            let blocks: Vec<String> = chunk.new_blocks.iter().map(ToString::to_string).collect();
            let blocks = match blocks.len() {
                0 => String::new(),
                _ => format!(" +b{}", blocks.join(",")),
            };
            write!(trace, " | s{id} {start}..{end}{blocks}{samples}").expect("a string");
        }
        trace.push('\n');
    }
}

#[test]
fn a_small_history_reads_as_expected() {
    let mut trace = String::new();
    let mut world = World::new(config(), &[8]);
    world.submit(request(0, 11, 12));
    world.submit(request(1, 3, 8));
    let mut important = request(2, 6, 9);
    important.priority = -1;
    world.submit(important);
    for step in 0..24 {
        match step {
            4 => {
                writeln!(trace, "-- request 1 is cancelled").expect("a string");
                world.handle(Event::Cancel(RequestId(1)));
            }
            5 => {
                writeln!(trace, "-- a request for six blocks comes").expect("a string");
                world.submit(request(3, 16, 4));
            }
            9 => {
                writeln!(trace, "-- instance 0 is lost, instance 1 comes").expect("a string");
                world.lose(0);
                world.ready(1, 16);
            }
            _ => {}
        }
        let plans = world.step();
        note(&mut trace, &plans);
    }
    world.run();
    world.check_done();
    insta::assert_snapshot!(trace);
}
