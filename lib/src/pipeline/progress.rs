//! Progress on standard error: a bar on a terminal, a plain line every few seconds otherwise, nothing when quiet.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::error::printable;

/// A line on standard error; nobody to read it is no error.
macro_rules! say {
    ($($what:tt)*) => {{
        let _ = writeln!(std::io::stderr(), $($what)*);
    }};
}

/// Time between two plain lines.
const INTERVAL: Duration = Duration::from_secs(5);

/// Where progress goes. Clones tell the same place.
#[derive(Debug, Clone)]
pub struct Progress(Arc<Kind>);

#[derive(Debug)]
enum Kind {
    Quiet,
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
}

#[derive(Debug)]
struct Lines {
    what: String,
    unit: Unit,
    done: u64,
    total: u64,
    start: Instant,
    last: Instant,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, shown with their multiples.
    Bytes,
    /// Multiply-adds, compilations: only the share is shown.
    Work,
}

impl Unit {
    fn template(self) -> &'static str {
        match self {
            Self::Bytes => "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            Self::Work => "{msg} [{wide_bar}] {percent}% {eta} left",
        }
    }
}

impl Progress {
    /// A bar or lines, as standard error is a terminal or not; nothing where `quiet`.
    pub fn new(quiet: bool) -> Self {
        let now = Instant::now();
        Self(Arc::new(if quiet {
            Kind::Quiet
        } else if std::io::stderr().is_terminal() {
            Kind::Bar(ProgressBar::hidden())
        } else {
            Kind::Lines(Mutex::new(Lines {
                what: String::new(),
                unit: Unit::Bytes,
                done: 0,
                total: 0,
                start: now,
                last: now,
            }))
        }))
    }

    /// Begins a phase of `total` bytes.
    pub fn start(&self, what: &str, total: u64) {
        self.start_counting(what, total, Unit::Bytes);
    }

    /// Begins a phase of `total` units.
    pub fn start_counting(&self, what: &str, total: u64, unit: Unit) {
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => {
                let style = ProgressStyle::with_template(unit.template());
                bar.set_style(style.expect("the template is a constant"));
                bar.reset();
                bar.set_length(total);
                bar.set_message(what.to_owned());
                bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            }
            Kind::Lines(lines) => {
                let now = Instant::now();
                let mut l = lines.lock().expect("no thread panics while it holds this");
                *l = Lines { what: what.to_owned(), unit, done: 0, total, start: now, last: now };
                match unit {
                    Unit::Bytes => say!("{what}: {}", HumanBytes(total)),
                    Unit::Work => say!("{what}"),
                }
            }
        }
    }

    /// So many more bytes, or whatever is counted, are done.
    pub fn advance(&self, n: u64) {
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => bar.inc(n),
            Kind::Lines(lines) => {
                let mut l = lines.lock().expect("no thread panics while it holds this");
                l.done += n;
                if l.last.elapsed() >= INTERVAL {
                    l.last = Instant::now();
                    let s = l.start.elapsed().as_secs_f64();
                    let left = s * l.total.saturating_sub(l.done) as f64 / l.done.max(1) as f64;
                    match l.unit {
                        Unit::Bytes => {
                            let (done, total) = (HumanBytes(l.done), HumanBytes(l.total));
                            say!("{}: {done} of {total} after {s:.0} s, {left:.0} s left", l.what);
                        }
                        Unit::Work => {
                            let percent = 100 * l.done / l.total.max(1);
                            say!("{}: {percent}% after {s:.0} s, {left:.0} s left", l.what);
                        }
                    }
                }
            }
        }
    }

    /// The phase is over.
    pub fn finish(&self) {
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => bar.finish_and_clear(),
            Kind::Lines(lines) => {
                let l = lines.lock().expect("no thread panics while it holds this");
                say!("{}: done after {:.1} s", l.what, l.start.elapsed().as_secs_f64());
            }
        }
    }

    /// The phase ended in an error: takes the bar away.
    pub fn clear(&self) {
        if let Kind::Bar(bar) = &*self.0 {
            bar.finish_and_clear();
        }
    }

    /// A line for people, unless quiet.
    pub fn note(&self, text: &str) {
        let text = printable(text);
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => bar.suspend(|| say!("{text}")),
            Kind::Lines(_) => say!("{text}"),
        }
    }
}
