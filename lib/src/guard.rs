//! Libraries that panic at some damaged files, or take a time or a memory that a stranger chooses.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::pipeline::meter;

thread_local! {
    /// True while a panic on this thread is about to become an error.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `f` gives; `None` where it panics, without the panic's own message. What it was working on must not be used again.
pub(crate) fn guarded<T>(f: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                before(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(outer);
    result.ok()
}

/// What a call may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) time: Duration,
    /// Bytes by which the process may grow meanwhile.
    pub(crate) memory: u64,
    /// Bytes of stack. They count as memory where they are used.
    pub(crate) stack: usize,
}

/// Runs `f` on a thread of its own, to its end or to a limit; `who` takes it, for the message.
///
/// # Errors
/// What was exceeded. The thread is left behind then; the error ends the process.
pub(crate) fn limited<T: Send + 'static>(
    who: &str,
    limits: Limits,
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = sync_channel(1);
    let (start, before) = (Instant::now(), meter::anonymous());
    std::thread::Builder::new()
        .stack_size(limits.stack)
        .spawn(move || drop(sender.send(f())))
        .map_err(|e| format!("no thread can be started for it: {e}"))?;
    loop {
        match receiver.recv_timeout(Duration::from_millis(2)) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Disconnected) => return Err(format!("{who} breaks its reader")),
            Err(RecvTimeoutError::Timeout) if start.elapsed() > limits.time => {
                return Err(format!("{who} takes more than {} s", limits.time.as_secs()));
            }
            Err(RecvTimeoutError::Timeout) if meter::anonymous().saturating_sub(before) > limits.memory => {
                return Err(format!("{who} takes more than {} MB of memory", limits.memory >> 20));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
