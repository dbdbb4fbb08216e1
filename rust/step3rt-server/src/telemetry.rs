//! Log lines on standard error, as the service manager or a person wants them.
//!
//! Prompts and outputs are never logged.

use std::os::linux::fs::MetadataExt;
use std::{fmt, fs, io};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::LogFormat;

/// What is logged, as `target=level,…`; the default is `info`.
pub const LOG_ENV: &str = "STEP3RT_LOG";

/// Whether standard error is the stream that the journal reads. The variable alone does not say so: programs
/// inherit it whose output goes elsewhere.
fn is_journal() -> bool {
    let stream =
        fs::metadata("/proc/self/fd/2").map(|it| format!("{}:{}", it.st_dev(), it.st_ino()));
    stream.is_ok_and(|stream| std::env::var("JOURNAL_STREAM") == Ok(stream))
}

/// Starts logging for this process. A process that logs already goes on as it does.
pub fn start(format: LogFormat) {
    let wanted = std::env::var(LOG_ENV).unwrap_or_default();
    let (filter, problem) = match wanted.parse::<Targets>() {
        Ok(filter) if !wanted.is_empty() => (filter, None),
        Ok(_) => (Targets::new().with_default(Level::INFO), None),
        Err(error) => (Targets::new().with_default(Level::INFO), Some(error)),
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match format {
        LogFormat::Json => layer.json().boxed(),
        LogFormat::Text if is_journal() => layer.event_format(JournalFormat).boxed(),
        LogFormat::Text => layer.with_ansi(false).with_target(false).boxed(),
    };
    let is_first = tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init()
        .is_ok();
    if let Some(error) = problem.filter(|_| is_first) {
        tracing::warn!(%error, "{LOG_ENV} = {wanted:?} is not a filter; `info` is used");
    }
}

/// One line with the priority that the journal reads, and without a time, which it adds.
struct JournalFormat;

impl<S, N> FormatEvent<S, N> for JournalFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        context
            .field_format()
            .format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
