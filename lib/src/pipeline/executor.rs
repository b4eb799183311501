//! Workers over units of work. Units are taken in order; a group is closed, once, when its last unit is done. What a
//! unit computes depends on nothing but the unit, so the number of workers cannot change a bit.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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
const FLUSH_BYTES: u64 = 128 << 20;

struct Group<R> {
    left: usize,
    results: Vec<Option<R>>,
}

/// Runs `units` on `workers` threads. `work` does one with its thread's scratch, `close` turns a group's results, in unit
/// order, into what the journal keeps. The first error (by unit) ends the run.
pub fn run<T: Sync, S, R: Send>(
    units: &[Unit<T>],
    workers: usize,
    sink: &Sink,
    progress: &Progress,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&T, &mut S) -> Result<R> + Sync,
    close: impl Fn(usize, Vec<R>) -> Result<Value> + Sync,
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
    let worker = || {
        let mut scratch = scratch();
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(unit) = units.get(i) else { break };
            let done = work(&unit.work, &mut scratch).and_then(|result| {
                written.fetch_add(unit.bytes, Ordering::Relaxed);
                progress.advance(unit.bytes);
                sink.advance();
                finish_unit(&groups, unit.group, i, result, sink, &close)
            });
            if let Err(e) = done {
                fail(i, e);
            }
        }
    };
    let idle = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut flushed = 0;
            while !idle.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
                let now = written.load(Ordering::Relaxed);
                if now - flushed >= FLUSH_BYTES {
                    flushed = now;
                    if let Err(e) = sink.flush() {
                        fail(usize::MAX, e);
                    }
                }
            }
        });
        let crew: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        for member in crew {
            if let Err(panic) = member.join() {
                idle.store(true, Ordering::Relaxed);
                stop.store(true, Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
        idle.store(true, Ordering::Relaxed);
    });
    let mut errors = errors.into_inner().expect("no thread panics while it holds this");
    errors.sort_by_key(|e| e.0);
    errors.into_iter().next().map_or(Ok(()), |(_, e)| Err(e))
}

type Groups<R> = Vec<(usize, usize, Mutex<Group<R>>)>;

/// For each group: its number, its first unit, and room for its results. Units of a group may be interleaved with
/// groupless ones.
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

fn finish_unit<R>(
    groups: &Groups<R>,
    group: Option<usize>,
    unit: usize,
    result: R,
    sink: &Sink,
    close: &impl Fn(usize, Vec<R>) -> Result<Value>,
) -> Result<()> {
    let Some(group) = group else { return Ok(()) };
    let (_, first, slot) = &groups[groups.partition_point(|g| g.1 <= unit) - 1];
    let complete = {
        let mut slot = slot.lock().expect("no thread panics while it holds this");
        slot.results[unit - first] = Some(result);
        slot.left -= 1;
        (slot.left == 0).then(|| std::mem::take(&mut slot.results))
    };
    match complete {
        Some(results) => sink.finish_group(group, close(group, results.into_iter().flatten().collect())?),
        None => Ok(()),
    }
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
