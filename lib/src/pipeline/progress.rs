//! Progress on standard error: a bar on a terminal, a plain line every few seconds otherwise, nothing when quiet.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

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
    done: u64,
    total: u64,
    start: Instant,
    last: Instant,
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
            Kind::Lines(Mutex::new(Lines { what: String::new(), done: 0, total: 0, start: now, last: now }))
        }))
    }

    /// Begins a phase of `total` bytes.
    pub fn start(&self, what: &str, total: u64) {
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => {
                let style =
                    ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}");
                bar.set_style(style.expect("the template is a constant"));
                bar.reset();
                bar.set_length(total);
                bar.set_message(what.to_owned());
                bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            }
            Kind::Lines(lines) => {
                let now = Instant::now();
                let mut l = lines.lock().expect("no thread panics while it holds this");
                *l = Lines { what: what.to_owned(), done: 0, total, start: now, last: now };
                eprintln!("{what}: {}", HumanBytes(total));
            }
        }
    }

    /// `bytes` more are done.
    pub fn advance(&self, bytes: u64) {
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => bar.inc(bytes),
            Kind::Lines(lines) => {
                let mut l = lines.lock().expect("no thread panics while it holds this");
                l.done += bytes;
                if l.last.elapsed() >= INTERVAL {
                    l.last = Instant::now();
                    let (done, total, s) = (HumanBytes(l.done), HumanBytes(l.total), l.start.elapsed().as_secs());
                    eprintln!("{}: {done} of {total} after {s} s", l.what);
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
                eprintln!("{}: done after {:.1} s", l.what, l.start.elapsed().as_secs_f64());
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
        match &*self.0 {
            Kind::Quiet => {}
            Kind::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Kind::Lines(_) => eprintln!("{text}"),
        }
    }
}
