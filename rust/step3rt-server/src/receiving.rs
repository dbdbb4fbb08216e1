//! How much of clients' requests is held at a time: bytes that have come and are not dealt with yet,
//! of each connection and of all.
//!
//! It never looks into a message. A request's first bytes count for nothing, so that ordinary
//! requests are served whatever others send; what more comes of it is refused when too much is held.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Frame, SizeHint};
use step3rt_core::error::ErrorKind;
use step3rt_proto::refusal::Refusal;
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::{Extensions, Request};

/// Bytes of a request that are not counted: a prompt of some ten thousand words. Streams are
/// bounded, so that these are, too.
const UNCOUNTED_BYTES: usize = 64 * 1024;
/// Most bytes that are counted of one connection: 256 streams, as many as the SDK opens, with prompts
/// of 65,536 tokens each are 67 MiB.
const MAX_CONNECTION_BYTES: usize = 128 * 1024 * 1024;
/// Most bytes that are counted of all connections.
const MAX_TOTAL_BYTES: usize = 1024 * 1024 * 1024;
/// How long a request whose bytes are counted may take to arrive. Who sends half of one and waits
/// must not keep others from sending theirs.
const RECEIVE_TIMEOUT: Duration = Duration::from_mins(1);

/// Bytes of one connection that may be held.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionBudget(Arc<Budget>);

impl Default for ConnectionBudget {
    fn default() -> Self {
        Self(Budget::new(MAX_CONNECTION_BYTES, "this connection"))
    }
}

/// Makes every request count for its connection and for all of them together.
pub(crate) fn counting() -> impl Fn(Request<Body>) -> Request<Body> + Clone {
    let of_all = Budget::new(MAX_TOTAL_BYTES, "all connections");
    move |request| {
        let connection = request.extensions().get::<ConnectionBudget>();
        let ConnectionBudget(of_one) = connection.expect("every connection has one");
        let budgets = [Arc::clone(of_one), Arc::clone(&of_all)];
        counted(request, budgets)
    }
}

/// Bytes that may be held.
#[derive(Debug)]
struct Budget {
    num_held_bytes: AtomicUsize,
    max_bytes: usize,
    /// Whose they are, for the text of a refusal.
    whose: &'static str,
}

impl Budget {
    fn new(max_bytes: usize, whose: &'static str) -> Arc<Self> {
        Arc::new(Self {
            num_held_bytes: AtomicUsize::new(0),
            max_bytes,
            whose,
        })
    }

    fn take(&self, num_bytes: usize) -> Result<(), Status> {
        let taken = |held: usize| Some(held + num_bytes).filter(|held| *held <= self.max_bytes);
        let order = Ordering::Relaxed; // it is a number and guards nothing
        let outcome = self.num_held_bytes.fetch_update(order, order, taken);
        outcome.map(drop).map_err(|_| self.exhausted())
    }

    fn give_back(&self, num_bytes: usize) {
        self.num_held_bytes.fetch_sub(num_bytes, Ordering::Relaxed);
    }

    fn exhausted(&self) -> Status {
        let text = format!(
            "long requests of {} that are on their way take {} bytes together, and no more are held \
             at a time. Send fewer long requests at a time",
            self.whose, self.max_bytes
        );
        Refusal::new(ErrorKind::QueueFull, text).into()
    }
}

/// What is held of one request. Given back when the last copy is dropped: that of whoever still works
/// on its text, or that of its body.
#[derive(Clone, Debug)]
pub(crate) struct Received(Arc<Held>);

#[derive(Debug)]
struct Held {
    budgets: [Arc<Budget>; 2],
    num_counted_bytes: AtomicUsize,
}

impl Received {
    /// What was received of the request with these extensions.
    pub(crate) fn of(extensions: &Extensions) -> Option<Self> {
        extensions.get::<Self>().cloned()
    }

    fn count(&self, num_bytes: usize) -> Result<(), Status> {
        let [first, second] = &self.0.budgets;
        first.take(num_bytes)?;
        if let Err(refusal) = second.take(num_bytes) {
            first.give_back(num_bytes);
            return Err(refusal);
        }
        let counted = &self.0.num_counted_bytes;
        counted.fetch_add(num_bytes, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for budget in &self.budgets {
            budget.give_back(*self.num_counted_bytes.get_mut());
        }
    }
}

/// `request` with a body that counts what comes of it for `budgets`.
fn counted(mut request: Request<Body>, budgets: [Arc<Budget>; 2]) -> Request<Body> {
    let received = Received(Arc::new(Held {
        budgets,
        num_counted_bytes: AtomicUsize::new(0),
    }));
    request.extensions_mut().insert(received.clone());
    request.map(|body| {
        Body::new(CountedBody {
            body,
            received,
            num_uncounted_bytes: UNCOUNTED_BYTES,
            too_late: None,
        })
    })
}

struct CountedBody {
    body: Body,
    received: Received,
    /// That may still come.
    num_uncounted_bytes: usize,
    /// Set when the first byte is counted.
    too_late: Option<Pin<Box<Sleep>>>,
}

impl CountedBody {
    fn take(&mut self, num_bytes: usize) -> Result<(), Status> {
        let num_uncounted = num_bytes.min(self.num_uncounted_bytes);
        self.num_uncounted_bytes -= num_uncounted;
        let num_counted = num_bytes - num_uncounted;
        if num_counted == 0 {
            return Ok(());
        }
        self.too_late
            .get_or_insert_with(|| Box::pin(sleep(RECEIVE_TIMEOUT)));
        self.received.count(num_counted)
    }
}

impl http_body::Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let num_bytes = frame.data_ref().map_or(0, Bytes::len);
                if let Err(refusal) = self.take(num_bytes) {
                    return Poll::Ready(Some(Err(refusal)));
                }
            }
            Poll::Pending => {
                let too_late = self.too_late.as_mut();
                if too_late.is_some_and(|timer| timer.as_mut().poll(context).is_ready()) {
                    return Poll::Ready(Some(Err(did_not_arrive())));
                }
            }
            Poll::Ready(_) => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn did_not_arrive() -> Status {
    let text = format!(
        "a request of more than {UNCOUNTED_BYTES} bytes did not arrive within {} s, and what came of \
         it is in the way of others. Send all of it at once",
        RECEIVE_TIMEOUT.as_secs()
    );
    Refusal::new(ErrorKind::DeadlineExceeded, text).into()
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body::Body as _;
    use tokio::sync::mpsc;
    use tokio::time::Instant;
    use tonic::Code;

    use super::*;

    /// Gives the chunks that come by a channel.
    struct Chunks(mpsc::Receiver<usize>);

    impl http_body::Body for Chunks {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            let next = self.0.poll_recv(context);
            next.map(|next| next.map(|size| Ok(Frame::data(Bytes::from(vec![0; size])))))
        }
    }

    fn request(budgets: &[Arc<Budget>; 2]) -> (mpsc::Sender<usize>, Request<Body>) {
        let (chunks, receiver) = mpsc::channel(8);
        let request = Request::new(Body::new(Chunks(receiver)));
        (chunks, counted(request, budgets.clone()))
    }

    async fn next(request: &mut Request<Body>) -> Option<Result<usize, Status>> {
        let frame = poll_fn(|context| Pin::new(request.body_mut()).poll_frame(context)).await?;
        Some(frame.map(|frame| frame.data_ref().map_or(0, Bytes::len)))
    }

    fn held(budgets: &[Arc<Budget>; 2]) -> [usize; 2] {
        [0, 1].map(|index| budgets[index].num_held_bytes.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn what_exceeds_the_first_bytes_is_held_until_nobody_works_on_it() {
        let budgets = [Budget::new(1_000, "one"), Budget::new(1_000, "all")];
        let (chunks, mut one) = request(&budgets);
        for (size, expected) in [(UNCOUNTED_BYTES - 1, 0), (301, 300), (700, 1_000)] {
            chunks.send(size).await.expect("read");
            assert_eq!(next(&mut one).await.expect("more").expect("taken"), size);
            assert_eq!(held(&budgets), [expected; 2]);
        }
        let received = Received::of(one.extensions()).expect("counted");
        drop(one);
        assert_eq!(held(&budgets), [1_000; 2], "its text is worked on");
        drop(received);
        assert_eq!(held(&budgets), [0; 2]);
    }

    #[tokio::test]
    async fn too_much_is_refused_to_long_requests_alone_and_either_budget_bounds() {
        for [connection, all] in [[10, 1_000], [1_000, 10]] {
            let budgets = [Budget::new(connection, "one"), Budget::new(all, "all")];
            let (chunks, mut first) = request(&budgets);
            chunks.send(UNCOUNTED_BYTES + 10).await.expect("read");
            next(&mut first).await.expect("more").expect("taken");
            let (chunks, mut second) = request(&budgets);
            chunks.send(UNCOUNTED_BYTES).await.expect("read");
            next(&mut second)
                .await
                .expect("more")
                .expect("an ordinary one");
            chunks.send(1).await.expect("read");
            let refusal = next(&mut second).await.expect("more").expect_err("refused");
            assert_eq!(refusal.code(), Code::ResourceExhausted);
            assert!(refusal.message().contains("take 10 bytes"), "{refusal}");
            assert_eq!(
                held(&budgets),
                [10; 2],
                "nothing is counted of what was refused"
            );
            drop(first);
            assert_eq!(held(&budgets), [0; 2]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_request_must_arrive_in_time_and_a_short_one_may_wait() {
        let budgets = [Budget::new(1_000, "one"), Budget::new(1_000, "all")];
        let (short, mut waiting) = request(&budgets);
        short.send(UNCOUNTED_BYTES).await.expect("read");
        next(&mut waiting).await.expect("more").expect("taken");
        let (long, mut late) = request(&budgets);
        long.send(UNCOUNTED_BYTES + 1).await.expect("read");
        next(&mut late).await.expect("more").expect("taken");
        let begun = Instant::now();
        let refusal = next(&mut late).await.expect("more").expect_err("late");
        assert_eq!(refusal.code(), Code::DeadlineExceeded);
        assert_eq!(begun.elapsed().as_secs(), RECEIVE_TIMEOUT.as_secs());
        let more = tokio::time::timeout(10 * RECEIVE_TIMEOUT, next(&mut waiting)).await;
        assert!(more.is_err(), "nothing was refused to it");
    }
}
