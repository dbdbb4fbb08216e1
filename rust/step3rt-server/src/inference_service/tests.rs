//! Texts that are worked on aside.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::mpsc::channel;
use std::task::Poll;

use super::*;

fn server() -> InferenceServer {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/byte_model");
    let model = Model {
        checkpoint: Checkpoint::read(path.as_ref(), None, None).expect("usable"),
        tokenizer: None,
        chat_template: None,
    };
    let (drive, _messages) = DriveHandle::new();
    let (_status, status) = watch::channel(ClusterStatus::default());
    InferenceServer::new(Arc::new(model), drive, Clock::start(), status)
}

#[tokio::test]
async fn a_long_text_keeps_its_place_until_it_is_done_though_its_client_left() {
    let server = server();
    let (go_on, is_told) = channel::<()>();
    {
        let wait = move || is_told.recv().is_err();
        let mut work = pin!(server.run_aside(MAX_INLINE_TEXT_BYTES + 1, wait));
        poll_fn(|context| {
            assert!(work.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
    }
    assert_eq!(server.long_texts.available_permits(), MAX_LONG_TEXTS - 1);
    drop(go_on);
    let all = u32::try_from(MAX_LONG_TEXTS).expect("few");
    let places = server.long_texts.acquire_many(all).await;
    drop(places.expect("given back"));
}
