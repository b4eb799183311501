//! Workers over units of work. Units are taken in order; a group is closed, once, when its last unit is done. What a
//! unit computes depends on nothing but the unit, so the number of workers cannot change a bit.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use serde_json::Value;

use super::progress::Progress;
use crate::checkpoint::sink::Sink;
use crate::error::{Error, Result};

/// A piece of work.
pub struct Unit<T> {
    /// The group that it belongs to; `None` for work that nothing waits for.
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
    results: Vec<Option<R>>,
}

/// A group whose units are all done.
type Done<R> = (usize, Vec<R>);

/// Runs `units` on `workers` threads. `work` does one with its thread's scratch, `close` turns a group's results, in unit
/// order, into what the journal keeps. One more thread waits for the disk, so that no worker does. The first error (by
/// unit) ends the run.
pub fn run<T: Sync, S, R: Send>(
    units: &[Unit<T>],
    workers: usize,
    sink: &Sink,
    progress: &Progress,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&T, &mut S) -> Result<R> + Sync,
    close: impl Fn(usize, Vec<R>) -> Value + Sync,
) -> Result<()> {
    let groups = group_table::<T, R>(units);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let errors: Mutex<Vec<(usize, Error)>> = Mutex::new(Vec::new());
    let fail = |unit: usize, error: Error| {
        errors.lock().expect("no thread panics while it holds this").push((unit, error));
        stop.store(true, Ordering::Relaxed);
    };
    let worker = |done: Sender<Done<R>>| {
        let mut scratch = scratch();
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = units.get(i) else { break };
            match work(&unit.work, &mut scratch) {
                Ok(result) => {
                    written.fetch_add(unit.bytes, Ordering::Relaxed);
                    progress.advance(unit.bytes);
                    if let Some(group) = finish_unit(&groups, unit.group, i, result) {
                        done.send(group).expect("the keeper lives until every sender is gone");
                    }
                    sink.advance();
                }
                Err(e) => fail(i, e),
            }
        }
    };
    let keeper = |done: Receiver<Done<R>>| {
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
            }
        }
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        scope.spawn(move || keeper(receiver));
        for _ in 0..workers {
            let sender = sender.clone();
            scope.spawn(|| worker(sender));
        }
    });
    let mut errors = errors.into_inner().expect("no thread panics while it holds this");
    errors.sort_by_key(|e| e.0);
    errors.into_iter().next().map_or(Ok(()), |(_, e)| Err(e))
}

type Groups<R> = Vec<(usize, usize, Mutex<Group<R>>)>;

/// For each group: its number, its first unit, and room for its results. Groupless units may stand between a group's.
fn group_table<T, R>(units: &[Unit<T>]) -> Groups<R> {
    let mut table: Groups<R> = Vec::new();
    for (i, unit) in units.iter().enumerate() {
        let Some(group) = unit.group else { continue };
        if table.last().is_none_or(|last| last.0 != group) {
            table.push((group, i, Mutex::new(Group { left: 0, results: Vec::new() })));
        }
        let last = table.last_mut().expect("pushed right above");
        let slot = last.2.get_mut().expect("not shared yet");
        slot.left += 1;
        slot.results.resize_with(i - last.1 + 1, || None);
    }
    table
}

/// Notes a unit's result; gives the whole group where this was its last unit.
fn finish_unit<R>(groups: &Groups<R>, group: Option<usize>, unit: usize, result: R) -> Option<Done<R>> {
    let group = group?;
    let (_, first, slot) = &groups[groups.partition_point(|g| g.1 <= unit) - 1];
    let mut slot = slot.lock().expect("no thread panics while it holds this");
    slot.results[unit - first] = Some(result);
    slot.left -= 1;
    (slot.left == 0).then(|| (group, std::mem::take(&mut slot.results).into_iter().flatten().collect()))
}

/// `f` over `items` on `workers` threads; results in the items' order, the first error (by item) where there is one.
pub fn map<T: Sync, R: Send>(items: &[T], workers: usize, f: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let slots: Vec<Mutex<Option<Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(i) else { break };
                    *slots[i].lock().expect("each slot has one writer") = Some(f(item));
                }
            });
        }
    });
    slots.into_iter().filter_map(|s| s.into_inner().expect("the threads are gone")).collect()
}
