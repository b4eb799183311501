//! Workers over units of work. Units are taken in order; a group is closed, once, when its last unit is done, wherever its
//! units stand in the list. What a unit computes depends on nothing but the unit, so the number of workers cannot change a
//! bit.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::Duration;

use serde_json::Value;

use super::progress::Progress;
use crate::checkpoint::sink::Sink;
use crate::error::{Error, Result};

/// A piece of a group's work.
pub struct Unit<T> {
    /// The group that it belongs to.
    pub group: usize,
    /// Bytes of output, for progress.
    pub bytes: u64,
    /// What to do.
    pub work: T,
}

/// What a worker takes next: a unit, or work that no group waits for.
pub struct Step<T> {
    /// The group that waits for it, if one does.
    pub group: Option<usize>,
    /// Bytes of output, for progress.
    pub bytes: u64,
    /// What to do.
    pub work: T,
}

/// Unwritten output that starts write-back.
const FLUSH_BYTES: u64 = 64 << 20;

struct Group<R> {
    left: usize,
    /// By step number, so that they are in unit order whoever was first.
    results: BTreeMap<usize, R>,
}

/// A group whose units are all done.
type Closed<R> = (usize, Vec<R>);

/// Runs `steps` on `workers` threads. `work` does one with its thread's scratch, `close` turns a group's results, in unit
/// order, into what the journal keeps. One more thread waits for the disk, so that no worker does. The first error (by
/// unit) ends the run.
pub fn run<T: Sync, S, R: Send>(
    steps: &[Step<T>],
    workers: usize,
    sink: &Sink,
    progress: &Progress,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&T, &mut S) -> Result<R> + Sync,
    close: impl Fn(usize, Vec<R>) -> Value + Sync,
) -> Result<()> {
    let groups = group_table::<T, R>(steps);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let errors: Mutex<Vec<(usize, Error)>> = Mutex::new(Vec::new());
    let fail = |unit: usize, error: Error| {
        errors.lock().expect("no thread panics while it holds this").push((unit, error));
        stop.store(true, Ordering::Relaxed);
    };
    let worker = |done: Sender<Closed<R>>| {
        let mut scratch = scratch();
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(step) = steps.get(i) else { break };
            match work(&step.work, &mut scratch) {
                Ok(result) => {
                    written.fetch_add(step.bytes, Ordering::Relaxed);
                    progress.advance(step.bytes);
                    if let Some(group) = finish_step(&groups, step.group, i, result) {
                        done.send(group).expect("the keeper lives until every sender is gone");
                    }
                    sink.advance();
                }
                Err(e) => fail(i, e),
            }
        }
    };
    let keeper = |done: Receiver<Closed<R>>| {
        let mut flushed = 0;
        loop {
            let result = match done.recv_timeout(Duration::from_millis(10)) {
                Ok((group, results)) => sink.finish_group(group, close(group, results)),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) if written.load(Ordering::Relaxed) - flushed >= FLUSH_BYTES => {
                    flushed = written.load(Ordering::Relaxed);
                    sink.flush()
                }
                Err(RecvTimeoutError::Timeout) => Ok(()),
            };
            if let Err(e) = result {
                fail(usize::MAX, e);
                // Nothing may be journaled behind what could not be. The workers stop; what they still send is taken.
                return done.into_iter().for_each(drop);
            }
        }
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        if let Err(e) = Builder::new().spawn_scoped(scope, move || keeper(receiver)) {
            return fail(0, Error::Thread(e));
        }
        for started in 0..workers {
            let own = sender.clone();
            // Where the system starts no more, those that run do the work; this thread, where none does.
            if Builder::new().spawn_scoped(scope, || worker(own)).is_err() {
                if started == 0 {
                    worker(sender);
                }
                return;
            }
        }
    });
    let mut errors = errors.into_inner().expect("no thread panics while it holds this");
    errors.sort_by_key(|e| e.0);
    errors.into_iter().next().map_or(Ok(()), |(_, e)| Err(e))
}

type Groups<R> = BTreeMap<usize, Mutex<Group<R>>>;

/// Every group of `steps`, with the number of its steps.
fn group_table<T, R>(steps: &[Step<T>]) -> Groups<R> {
    let mut table = Groups::new();
    for group in steps.iter().filter_map(|s| s.group) {
        let slot = table.entry(group).or_insert_with(|| Mutex::new(Group { left: 0, results: BTreeMap::new() }));
        slot.get_mut().expect("not shared yet").left += 1;
    }
    table
}

/// Notes a step's result; gives the whole group where this was its last step.
fn finish_step<R>(groups: &Groups<R>, group: Option<usize>, step: usize, result: R) -> Option<Closed<R>> {
    let group = group?;
    let mut slot = groups[&group].lock().expect("no thread panics while it holds this");
    slot.results.insert(step, result);
    slot.left -= 1;
    (slot.left == 0).then(|| (group, std::mem::take(&mut slot.results).into_values().collect()))
}

/// `f` over `items` on `workers` threads; results in the items' order, the first error (by item) where there is one.
pub fn map<T: Sync, R: Send>(items: &[T], workers: usize, f: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let slots: Vec<Mutex<Option<Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(i) else { break };
                *slots[i].lock().expect("each slot has one writer") = Some(f(item));
            }
        };
        // This thread is one of the workers, and the only one where the system starts no other.
        for _ in 1..workers.clamp(1, items.len().max(1)) {
            if Builder::new().spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    slots.into_iter().filter_map(|s| s.into_inner().expect("the threads are gone")).collect()
}
