use proptest::prelude::*;

use super::*;
use crate::step_time::StepLoad;

const BLOCK: u32 = 4;

fn config() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 2,
        block_size_tokens: BLOCK,
        max_model_len: 1_024,
        max_tokens_per_micro_batch: 16,
        max_steps_in_flight: 2,
        target_tpot_ms: 50,
        max_sequences_per_lane: 8,
        max_waiting_requests: 8,
        recovery_timeout_ms: 1_000,
        assumes_computed_prompts: false,
    }
}

/// An instance and who stays on it.
struct Home {
    instance: Instance,
    table: SequenceTable,
    growth: Growth,
    num_joins: u64,
}

impl Home {
    fn new(num_blocks: u32) -> Self {
        let pool = BlockPool::new(num_blocks);
        Self {
            instance: Instance::new(InstanceId(0), Epoch(1), pool, 2),
            table: SequenceTable::default(),
            growth: Growth::default(),
            num_joins: 0,
        }
    }

    fn sequence(&self, num_tokens: u32, max_new_tokens: u32) -> Sequence {
        let prompt: Vec<u32> = (0..num_tokens).collect();
        let mut sequence = Sequence::for_tests(&prompt, &[]);
        sequence.details.rank.arrival = self.num_joins;
        sequence.max_known_tokens = num_tokens + max_new_tokens;
        sequence
    }

    fn has_room_for(&mut self, sequence: &Sequence) -> bool {
        let newcomer = Newcomer {
            sequence,
            num_blocks: num_blocks(sequence.num_known_tokens(), BLOCK).into(),
            num_blocks_at_most: num_blocks(sequence.max_known_tokens - 1, BLOCK).into(),
        };
        let foresight = Foresight {
            growth: &self.growth,
            sequences: &self.table,
            block_size_tokens: BLOCK,
        };
        self.instance.has_room_for(newcomer, foresight)
    }

    fn join(&mut self, lane: LaneId, sequence: Sequence) -> Slot {
        let prefix = self
            .instance
            .pool
            .find_prefix(sequence.tenant, [].into_iter());
        let place = Place {
            id: SequenceId(self.num_joins),
            vacancy: Vacancy { lane, prefix },
            block_size_tokens: BLOCK,
            is_assumed_computed: false,
        };
        self.num_joins += 1;
        let slot = self.table.insert(sequence);
        self.instance.join(slot, &mut self.table[slot], place);
        slot
    }

    /// The load of the next step of `lane`, which succeeds.
    fn step(&mut self, lane: LaneId) -> StepLoad {
        let planned = self
            .instance
            .plan_lane((TimeNs(0), lane), &config(), &mut self.table);
        let step = planned.expect("it has work").plan.key.step;
        let taken = self.instance.lane_mut(lane).take_step(TimeNs(0), step);
        let in_flight = taken.expect("it is in flight").0;
        for &(slot, asked) in &in_flight.chunks {
            let sequence = &mut self.table[slot];
            let output = crate::step::SequenceOutput {
                sequence: asked.sequence,
                token: asked.samples.then_some(crate::ids::TokenId(0)),
                logprob: None,
                prompt_logprobs: Vec::new(),
                is_corrupt: false,
            };
            let taken = (asked, Some(output));
            assert_eq!(sequence.accept(TimeNs(0), taken, &mut Vec::new()), Ok(None));
            self.instance.end_step_of(sequence, asked, false);
        }
        in_flight.load
    }
}

#[test]
fn a_steps_load_is_what_it_computes_and_reads_and_who_takes_turns_with_it() {
    let mut home = Home::new(64);
    home.join(LaneId(0), home.sequence(20, 8));
    let load = |decodes, prefill, context, others| StepLoad {
        num_decodes: decodes,
        num_prefill_tokens: prefill,
        num_context_tokens: context,
        num_other_lanes: others,
    };
    assert_eq!(home.step(LaneId(0)), load(0, 16, 16, 0));
    home.join(LaneId(1), home.sequence(2, 8));
    assert_eq!(home.step(LaneId(0)), load(0, 4, 20, 1));
    assert_eq!(home.step(LaneId(0)), load(1, 0, 21, 1));
    assert_eq!(home.step(LaneId(1)), load(0, 2, 2, 1));
    home.join(LaneId(0), home.sequence(1, 8));
    assert_eq!(home.step(LaneId(0)), load(2, 0, 22 + 1, 1));
}

#[derive(Clone, Debug)]
enum Change {
    /// Somebody asks, and stays if there is room.
    Ask(u32, u32),
    /// One leaves.
    Leave(usize),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        4 => (1_u32..16, 1_u32..60).prop_map(|(prompt, new)| Change::Ask(prompt, new)),
        1 => any::<usize>().prop_map(Change::Leave),
    ];
    prop::collection::vec(change, 0..60)
}

proptest! {
    /// What is remembered of a refusal spares a look at all who stay, and decides nothing.
    #[test]
    fn whoever_is_refused_by_memory_would_be_refused_by_a_look(
        num_blocks in 8_u32..40,
        share in 1_u32..=10,
        changes in changes(),
    ) {
        let mut home = Home::new(num_blocks);
        for _ in 0..20 {
            home.growth.note_end(10, share);
        }
        let mut stays: Vec<Slot> = Vec::new();
        for change in changes {
            match change {
                Change::Ask(num_tokens, max_new_tokens) => {
                    let newcomer = home.sequence(num_tokens, max_new_tokens);
                    let remembered = home.instance.refused.take();
                    let by_a_look = home.has_room_for(&newcomer);
                    home.instance.refused = remembered;
                    prop_assert_eq!(home.has_room_for(&newcomer), by_a_look);
                    if by_a_look {
                        stays.push(home.join(LaneId(0), newcomer));
                    }
                }
                Change::Leave(index) if !stays.is_empty() => {
                    let slot = stays.swap_remove(index % stays.len());
                    let mut sequence = home.table.remove(slot);
                    prop_assert!(home.instance.leave(&mut sequence, AfterStep::Ends));
                }
                Change::Leave(_) => {}
            }
        }
    }
}
