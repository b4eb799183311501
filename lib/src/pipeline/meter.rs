//! What a run costs: wall time and resident memory, as Linux accounts them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Watches this process until it is read.
pub struct Meter {
    start: Instant,
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What a [`Meter`] saw.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// Wall time.
    pub seconds: f64,
    /// Greatest resident memory, mapped files included; 0 where the system does not say.
    pub peak_resident: u64,
    /// Greatest anonymous resident memory among ten looks a second.
    pub peak_anonymous: u64,
}

/// A line of /proc/self/status, in bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    line.and_then(|l| l.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Anonymous resident memory of this process now; 0 where the system does not say.
pub fn anonymous() -> u64 {
    status("RssAnon")
}

impl Meter {
    /// Starts watching.
    pub fn start() -> Self {
        let (peak, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (p, s) = (peak.clone(), stop.clone());
        let watch = move || {
            while !s.load(Ordering::Relaxed) {
                p.fetch_max(status("RssAnon"), Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(100));
            }
        };
        // Without a thread the last look is the only one.
        let thread = std::thread::Builder::new().spawn(watch).ok();
        Self { start: Instant::now(), peak, stop, thread }
    }

    /// Stops watching.
    pub fn read(mut self) -> Reading {
        self.end();
        Reading {
            seconds: self.start.elapsed().as_secs_f64(),
            peak_resident: status("VmHWM"),
            peak_anonymous: self.peak.load(Ordering::Relaxed).max(status("RssAnon")),
        }
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.end();
    }
}
