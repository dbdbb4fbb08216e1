//! Event by event: what a client is told, and what the drive loop hears.

use step3rt_proto::v1::finished::Matched;
use tokio::task::JoinHandle;
use tonic_types::StatusExt;

use super::*;
use crate::outbox::max_unsent_tokens;
use crate::text::tokenizer::tests::byte_tokenizer;

const ID: RequestId = RequestId(9);
const STARTED: RequestEvent = RequestEvent::Started {
    num_cached_tokens: 0,
};

/// A stream between two channels.
struct Harness {
    events: mpsc::Sender<RequestEvent>,
    responses: mpsc::Receiver<Result<GenerateResponse, Status>>,
    drive: mpsc::Receiver<Message>,
    task: JoinHandle<()>,
}

fn start(n: u32, stop_strings: &[&str]) -> Harness {
    resume(n, stop_strings, b"")
}

fn resume(n: u32, stop_strings: &[&str], resumed: &[u8]) -> Harness {
    let (handle, drive) = DriveHandle::new();
    let stream = ResponseStream::new(StreamParts {
        id: ID,
        client_id: "mine".to_owned(),
        n,
        num_prompt_tokens: 3,
        resumed: resumed.iter().map(|byte| TokenId((*byte).into())).collect(),
        text_rules: TextRules {
            tokenizer: Some(Arc::new(byte_tokenizer())),
            stop_strings: stop_strings.iter().map(|s| (*s).to_owned()).collect(),
            include_stop: false,
            skip_special_tokens: true,
            stop_tokens: vec![],
            min_tokens: 0,
        },
        wants_text: true,
        wants_token_ids: true,
        drive: handle,
        metrics: RequestMetrics::default(),
    });
    let (events, receiver) = mpsc::channel(max_unsent_tokens(n));
    let (sender, responses) = mpsc::channel(RESPONSE_BOUND);
    Harness {
        events,
        responses,
        drive,
        task: tokio::spawn(stream.run(receiver, sender)),
    }
}

impl Harness {
    async fn tell(&self, event: RequestEvent) {
        self.events.send(event).await.expect("the stream runs");
    }

    async fn tokens(&self, index: u32, first_position: u32, text: &str) {
        for (position, byte) in (first_position..).zip(text.bytes()) {
            self.tell(RequestEvent::Token {
                index,
                position,
                token: TokenId(byte.into()),
                logprob: None,
            })
            .await;
        }
    }

    async fn finished(&self, index: u32) {
        self.tell(RequestEvent::Finished {
            index,
            reason: FinishReason::Length,
            usage: Usage::default(),
        })
        .await;
    }

    /// Text and ids of continuation 0, every Finished, and the status if there is one.
    async fn read_all(&mut self) -> (String, Vec<u32>, Vec<v1::Finished>, Option<Status>) {
        let (mut text, mut ids, mut finished, mut status) = (String::new(), vec![], vec![], None);
        while let Some(response) = self.responses.recv().await {
            match response.map(|response| response.event.expect("an event")) {
                Ok(Event::Started(_)) => {}
                Ok(Event::Delta(delta)) => {
                    text.push_str(&delta.text);
                    ids.extend(delta.token_ids);
                }
                Ok(Event::Finished(end)) => finished.push(end),
                Err(error) => assert!(status.replace(error).is_none()),
            }
        }
        (text, ids, finished, status)
    }
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().expect("ErrorInfo").reason
}

#[tokio::test]
async fn tokens_that_come_after_a_stop_string_are_not_told() {
    let mut harness = start(1, &["END"]);
    harness.tell(STARTED).await;
    harness.tokens(0, 0, "a END and more").await;
    let stopped = harness.drive.recv().await;
    assert!(matches!(
        stopped,
        Some(Message::Stop {
            request: ID,
            index: 0
        })
    ));
    // The scheduler had met another end before it heard of the stop.
    harness.finished(0).await;
    let (text, ids, finished, status) = harness.read_all().await;
    assert_eq!((text.as_str(), ids.len()), ("a ", "a END".len()));
    assert_eq!(finished[0].reason(), WireReason::Stop);
    assert_eq!(
        finished[0].matched,
        Some(Matched::StopString("END".to_owned()))
    );
    assert_eq!(finished[0].usage.expect("usage").completion_tokens, 5);
    assert!(status.is_none());
}

#[tokio::test]
async fn held_text_is_told_before_the_end() {
    let mut harness = start(1, &["END"]);
    harness.tokens(0, 0, "a EN").await;
    harness.finished(0).await;
    let (text, ids, finished, _) = harness.read_all().await;
    assert_eq!((text.as_str(), ids.len()), ("a EN", 4));
    assert_eq!(finished[0].reason(), WireReason::Length);
}

#[tokio::test]
async fn a_resumed_stream_ends_the_character_and_the_stop_string_that_were_begun() {
    let mut harness = resume(1, &["END"], b"a\xC3");
    harness
        .tell(RequestEvent::Token {
            index: 0,
            position: 2,
            token: TokenId(0xA9),
            logprob: None,
        })
        .await;
    harness.finished(0).await;
    assert_eq!(harness.read_all().await.0, "é");

    let mut harness = resume(1, &["END"], b"a EN");
    harness.tokens(0, 4, "D").await;
    assert!(matches!(
        harness.drive.recv().await,
        Some(Message::Stop { .. })
    ));
    harness.finished(0).await;
    let (text, ids, finished, _) = harness.read_all().await;
    assert_eq!((text.as_str(), ids.len()), ("", 1));
    assert_eq!(
        finished[0].matched,
        Some(Matched::StopString("END".to_owned()))
    );
}

#[tokio::test]
async fn resuming_a_stream_that_a_stop_string_had_ended_ends_it_again() {
    let mut harness = resume(1, &["END"], b"a END");
    assert!(matches!(
        harness.drive.recv().await,
        Some(Message::Stop { .. })
    ));
    harness.tokens(0, 5, "more").await;
    harness.finished(0).await;
    let (text, ids, finished, _) = harness.read_all().await;
    assert_eq!((text.as_str(), ids.len()), ("", 0));
    assert_eq!(finished[0].reason(), WireReason::Stop);
}

#[tokio::test]
async fn a_client_that_leaves_cancels() {
    let mut harness = start(1, &[]);
    drop(harness.responses);
    assert!(matches!(
        harness.drive.recv().await,
        Some(Message::Cancel(ID))
    ));
    harness.task.await.expect("ended");
}

#[tokio::test]
async fn a_request_that_the_drive_loop_cut_ends_as_slow_consumer() {
    let mut harness = start(1, &[]);
    harness.tokens(0, 0, "ab").await;
    let (never, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut harness.events, never));
    let (text, _, finished, status) = harness.read_all().await;
    assert_eq!((text.as_str(), finished.len()), ("ab", 0));
    let status = status.expect("an error");
    assert_eq!(reason(&status), "SLOW_CONSUMER");
    assert_eq!(
        status
            .metadata()
            .get(COMPLETION_TOKENS_KEY)
            .expect("counted"),
        "2"
    );
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_at_the_bound() {
    let mut harness = start(1, &[]);
    for position in 0..1_100 {
        let token = RequestEvent::Token {
            index: 0,
            position,
            token: TokenId(97),
            logprob: None,
        };
        if harness.events.send(token).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        harness.drive.recv().await,
        Some(Message::Cancel(ID))
    ));
    let (_, ids, _, status) = harness.read_all().await;
    assert_eq!(reason(&status.expect("an error")), "SLOW_CONSUMER");
    assert!(ids.len() < 1_100, "what waited is dropped");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_for_half_a_minute_is_cut() {
    let mut harness = start(1, &[]);
    for position in 0..10 {
        let token = RequestEvent::Token {
            index: 0,
            position,
            token: TokenId(97),
            logprob: None,
        };
        harness.tell(token).await;
        tokio::task::yield_now().await;
    }
    let started = Instant::now();
    assert!(matches!(
        harness.drive.recv().await,
        Some(Message::Cancel(ID))
    ));
    assert_eq!(started.elapsed().as_secs(), SLOW_CONSUMER_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_slow_token_does_not_make_a_slow_client() {
    let mut harness = start(1, &[]);
    // Exactly what the transport holds, so that the next token must wait from its first moment.
    harness.tell(STARTED).await;
    for (position, text) in (1..RESPONSE_BOUND).zip(["a"; RESPONSE_BOUND]) {
        tokio::task::yield_now().await;
        let position = u32::try_from(position - 1).expect("small");
        harness.tokens(0, position, text).await;
    }
    tokio::time::sleep(SLOW_CONSUMER_TIMEOUT * 10).await;
    harness.tokens(0, 3, "b").await;
    tokio::time::sleep(SLOW_CONSUMER_TIMEOUT / 2).await;
    harness.finished(0).await;
    let (text, _, finished, status) = harness.read_all().await;
    assert_eq!((text.as_str(), finished.len()), ("aaab", 1));
    assert!(status.is_none());
}

#[tokio::test]
async fn an_abort_finishes_only_what_has_not() {
    let mut harness = start(2, &[]);
    harness.finished(1).await;
    let cancelled = RequestError {
        kind: ErrorKind::Cancelled,
        message: String::new(),
        retry_after_ms: None,
    };
    harness.tell(RequestEvent::Failed(cancelled)).await;
    let (_, _, finished, status) = harness.read_all().await;
    let ends: Vec<_> = finished
        .iter()
        .map(|end| (end.index, end.reason()))
        .collect();
    assert_eq!(ends, [(1, WireReason::Length), (0, WireReason::Cancelled)]);
    assert!(status.is_none());
}

#[tokio::test]
async fn a_stream_that_ends_while_it_waits_for_a_place_is_started_first() {
    let mut harness = start(2, &[]);
    let cancelled = RequestError {
        kind: ErrorKind::Cancelled,
        message: String::new(),
        retry_after_ms: None,
    };
    harness.tell(RequestEvent::Failed(cancelled)).await;
    let mut kinds = vec![];
    while let Some(response) = harness.responses.recv().await {
        kinds.push(match response.expect("no error").event {
            Some(Event::Started(started)) => (started.request_id, started.prompt_tokens),
            other => (format!("{other:?}")[.."Some(Finished".len()].to_owned(), 0),
        });
    }
    let finished = ("Some(Finished".to_owned(), 0);
    assert_eq!(kinds, [("mine".to_owned(), 3), finished.clone(), finished]);
}

#[tokio::test]
async fn every_end_repeats_how_much_of_the_prompt_was_cached() {
    let mut harness = start(2, &[]);
    harness
        .tell(RequestEvent::Started {
            num_cached_tokens: 2,
        })
        .await;
    harness.finished(0).await;
    harness.finished(1).await;
    let (_, _, finished, _) = harness.read_all().await;
    let cached: Vec<_> = finished
        .iter()
        .map(|end| end.usage.expect("a usage").cached_tokens)
        .collect();
    assert_eq!(cached, [2, 2]);
}

#[tokio::test]
async fn an_internal_error_keeps_its_text_to_itself() {
    let mut harness = start(1, &[]);
    let internal = RequestError {
        kind: ErrorKind::Internal,
        message: "secret pointer".to_owned(),
        retry_after_ms: None,
    };
    harness.tell(RequestEvent::Failed(internal)).await;
    let (_, _, _, status) = harness.read_all().await;
    let status = status.expect("an error");
    assert_eq!(reason(&status), "INTERNAL");
    assert!(!status.message().contains("secret"), "{}", status.message());
}
