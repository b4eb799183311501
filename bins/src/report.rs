//! Manifests as text for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use gptoss::bench::GemmRow;
use gptoss::error::printable;
use gptoss::formats::activations::Activations;
use gptoss::kernels::gpu::selftest::KernelTest;
use gptoss::kernels::store::KernelBuild;
use gptoss::manifest::{BenchRow, ErrorReport, FileSet, Job, Loads, Manifest, TensorReport};
use gptoss::recipe::{GroupSize, LayerRecipe, Observer, Recipe};
use gptoss::verify::quality::QualityReport;

/// A build of kernels: its files, with the beginning of their hashes.
fn kernels(o: &mut String, k: &KernelBuild, path: Option<&str>) {
    for f in &k.files {
        let _ = writeln!(o, "{:<36} {:>7} bytes  sha256 {}...", f.name, f.bytes, &f.sha256[..16]);
    }
    line(o, "compiler", &format!("nvcc {} {}", k.nvcc, k.flags.join(" ")));
    line(o, "architectures", &k.targets.join(";"));
    line(o, "build", &k.id);
    if let Some(path) = path {
        line(o, "installed in", path);
    }
}

/// A manifest as a table.
pub fn table(m: &Manifest) -> String {
    let mut out = String::new();
    let o = &mut out;
    if let Some(env) = &m.environment {
        environment(o, env);
    }
    kernel_tests(o, &m.kernel_tests);
    if let (Job::InstallKernels, Some(k)) = (&m.job, &m.kernels) {
        kernels(o, k, m.volatile.as_ref().and_then(|v| v.output_path.as_deref()));
        return out;
    }
    tensors(o, &m.tensors);
    if let Job::Quantize { recipe: r } = &m.job {
        recipe(o, r);
    }
    sizes(o, m);
    if let Some(c) = m.conversion.filter(|c| c.overflows + c.subnormals + c.underflows > 0) {
        line(
            o,
            "conversion",
            &format!("{} overflows, {} subnormals, {} underflows", c.overflows, c.subnormals, c.underflows),
        );
    }
    if let Some(v) = &m.verdict {
        if let Some(e) = &v.total_error {
            line(o, "error", &format!("relative {:.3e}, rms {:.3e}, max {:.3e}", e.relative, e.rms, e.max));
        }
        let hashes = match (v.hashes_checked, &m.job) {
            (true, _) => "hashes compared",
            (false, Job::Against) => "hashes not compared (check does that)",
            (false, _) => "no manifest, so no hashes",
        };
        if let Some(n) = v.total_error.as_ref().map(|e| e.non_finite).filter(|&n| n > 0) {
            line(o, "left out", &format!("{n} numbers that are NaN or infinite"));
        }
        let state = if v.passed { "passed" } else { "FAILED" };
        let what = if matches!(m.job, Job::Reproduce { .. }) { "files" } else { "tensors" };
        line(o, "check", &format!("{state}: {} {what}, {hashes}, {} findings", v.tensors, v.findings.len()));
        for f in v.findings.iter().take(20) {
            line(o, &format!("  {}", f.kind), &format!("{}: {}", f.file, f.message));
        }
        if v.findings.len() > 20 {
            line(o, "", &format!("... and {} more; --format json lists all", v.findings.len() - 20));
        }
    }
    if let Some(q) = &m.quality {
        quality(o, q);
    }
    bench(o, m.volatile.as_ref().map(|v| &v.bench[..]).unwrap_or_default());
    gemm(o, m.volatile.as_ref().map(|v| &v.gemm[..]).unwrap_or_default());
    for r in &m.runtimes {
        let status = match r.status {
            Loads::Loads => "loads",
            Loads::LoadsWrongly => "loads WRONGLY",
            Loads::DoesNotLoad => "does not load",
        };
        line(o, &r.runtime, &format!("{status}: {}", r.reason));
        if matches!(m.job, Job::Runtimes) {
            line(o, "", &format!("  read in {}", r.source));
        }
    }
    for n in &m.notes {
        line(o, "note", n);
    }
    if let Some(v) = &m.volatile {
        if let Some(path) = &v.source_path {
            line(o, "source", path);
        }
        if let Some(path) = &v.output_path {
            line(o, if m.kernels.is_some() { "kernels" } else { "output" }, path);
        }
        line(
            o,
            "took",
            &format!("{:.2} s, {} of memory besides mapped files", v.seconds, human(v.peak_anonymous_bytes)),
        );
    }
    out
}

/// What was asked for, resolved.
fn recipe(o: &mut String, r: &Recipe) {
    let layer = |l: &LayerRecipe| {
        if !l.is_rounded() {
            return l.scheme.to_string();
        }
        let groups = match l.group_size {
            GroupSize::Auto => "groups as they fit".into(),
            GroupSize::Channel => "a scale a channel".into(),
            GroupSize::Tensor => "one scale".into(),
            GroupSize::Block => "blocks of 128 by 128".into(),
            GroupSize::Size(n) => format!("groups of {n}"),
        };
        let kind = if l.symmetric { "" } else { ", asymmetric" };
        let observer = if l.observer == Observer::Mse { ", searched scales" } else { "" };
        format!("{} by {}, {groups}{kind}{observer}", l.scheme, l.algorithm.tag())
    };
    line(o, "experts", &layer(&r.experts));
    line(o, "other weights", &layer(&r.mw));
    for over in &r.overrides {
        let more = over.targets.len().saturating_sub(3);
        let and = if more > 0 { format!(" and {more} more") } else { String::new() };
        let targets = over.targets[..over.targets.len() - more].join(", ");
        line(o, "but", &format!("{targets}{and}: {}", layer(&over.layer)));
    }
    line(o, "left alone", &r.ignore.join(", "));
    if let Some(s) = &r.sparsity {
        line(o, "zeros", &format!("{}, {:.0}%", s.mask, 100.0 * s.sparsity));
    }
    if let Some(s) = &r.smoothquant {
        line(o, "smoothing", &format!("SmoothQuant, strength {}", s.strength));
    }
}

fn quality(o: &mut String, q: &QualityReport) {
    let names = |a: &[Activations]| a.iter().map(|a| a.name()).collect::<Vec<_>>().join(", ");
    let t = &q.text;
    line(o, "text", &format!("{}: {} sequences, {} tokens", t.source.name, t.sequences, t.tokens));
    line(o, "inputs", &names(&q.activations));
    line(o, "perplexity", &format!("{:.4} (nll {:.6})", q.perplexity, q.nll));
    if let Some(r) = &q.reference {
        line(o, "of the source", &format!("{:.4} (nll {:.6}), ratio {:.5}", r.perplexity, r.nll, r.perplexity_ratio));
        line(o, "KL divergence", &format!("mean {:.6}, 99% below {:.6}", r.kl_mean, r.kl_p99));
        line(o, "same top token", &format!("{:.2}%", 100.0 * r.top1_agreement));
    }
    if let Some(e) = &q.engine {
        let kl = format!("KL mean {:.6}, 99% below {:.6}", e.kl_mean, e.kl_p99);
        line(o, "engine, exact", &format!("{kl}, same top token {:.2}%", 100.0 * e.top1_agreement));
    }
}

fn bench(o: &mut String, rows: &[BenchRow]) {
    for r in rows {
        let rate = match (r.gigabytes_per_second, r.read_gigabytes_per_second) {
            (Some(g), Some(read)) => format!(", {g:.2} GB/s, {:.0}% of plain reads", 100.0 * g / read),
            (Some(g), None) => format!(", {g:.2} GB/s"),
            _ => String::new(),
        };
        let bytes = human(r.bytes_per_token);
        let slow = format!("{:.2} in the slowest tenth", r.slow_tokens_per_second);
        line(
            o,
            &format!("{} threads", r.threads),
            &format!("{:.2} tokens/s ({slow}), {bytes} a token{rate}", r.tokens_per_second),
        );
    }
}

/// A line a product.
fn gemm(o: &mut String, rows: &[GemmRow]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(
        o,
        "{:<4} {:<22} {:>5} {:<13} {:>5} {:>11} {:>22} {:>8} {:>8} {:>9} {:>6}",
        "on", "layer", "M", "kernel", "group", "us", "(10% to 90%)", "TFLOP/s", "GB/s", "of bandw.", "ratio"
    );
    for r in rows {
        let group = if r.group == 0 { String::new() } else { r.group.to_string() };
        let spread = format!("({:.2} to {:.2})", r.fast_microseconds, r.slow_microseconds);
        let ratio = r.speedup.map_or(String::new(), |s| format!("{s:.2}"));
        let _ = writeln!(
            o,
            "{:<4} {:<22} {:>5} {:<13} {group:>5} {:>11.2} {spread:>22} {:>8.3} {:>8.1} {:>8.0}% {ratio:>6}",
            r.device,
            r.layer,
            r.m,
            r.kernel,
            r.microseconds,
            r.teraflops,
            r.gigabytes_per_second,
            100.0 * r.bandwidth_share
        );
    }
}

/// A line a kernel.
fn kernel_tests(o: &mut String, tests: &[KernelTest]) {
    for t in tests {
        let share = 100.0 * t.same as f64 / t.numbers.max(1) as f64;
        let bits = format!("{share:.1}% of {} numbers have the reference's bits", t.numbers);
        let how = if t.exact { bits } else { format!("error {:.2} of what rounding may do; {bits}", t.error) };
        let state = t.failure.as_ref().map_or("right".into(), |f| format!("WRONG: {f}"));
        let _ = writeln!(o, "{:<22} {} in {} launches: {how}", t.kernel, printable(&state), t.cases);
        if let Some(pattern) = &t.pattern {
            let _ = writeln!(o, "{:<22} {pattern}", "");
        }
    }
}

fn line(o: &mut String, key: &str, value: &str) {
    let _ = writeln!(o, "{key:<14} {}", printable(value));
}

/// `13.8 GB`.
pub fn human(bytes: u64) -> String {
    let mut n = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if n < 1000.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{n:.1} {unit}") };
        }
        n /= 1000.0;
    }
    format!("{n:.1} TB")
}

fn sizes(o: &mut String, m: &Manifest) {
    let describe = |f: &FileSet| format!("{} in {} files ({})", human(f.bytes), f.files.len(), f.layout);
    if let Some(s) = &m.source {
        line(o, "source size", &describe(s));
    }
    if let Some(out) = &m.output {
        line(o, "output size", &describe(out));
    }
    if let (Some(s), Some(out)) = (&m.source, &m.output)
        && s.bytes > 0
    {
        line(o, "ratio", &format!("{:.3} of the source", out.bytes as f64 / s.bytes as f64));
    }
    if let Some(p) = &m.plan {
        let from = if p.weights_read { "headers" } else { "config.json alone" };
        line(o, "plan", &format!("{} in {} shards, {} tensors, from {from}", human(p.bytes), p.shards, p.tensors));
    }
}

/// One line a kind of tensor, all layers together.
fn tensors(o: &mut String, reports: &[TensorReport]) {
    #[derive(Default)]
    struct Row {
        tensors: u64,
        parameters: u64,
        error: Option<(f64, f64, f64)>,
    }
    let mut rows: BTreeMap<(String, &str), Row> = BTreeMap::new();
    for r in reports {
        let row = rows.entry((over_layers(&r.name), &r.stored)).or_default();
        row.tensors += r.tensors;
        row.parameters += r.parameters;
        if let Some(e) = &r.error {
            let (square, norm, max) = row.error.unwrap_or_default();
            row.error = Some((square + squares(e, r.parameters), norm + norms(e, r.parameters), max.max(e.max)));
        }
    }
    if rows.is_empty() {
        return;
    }
    let _ =
        writeln!(o, "{:<44} {:>7} {:<20} {:>9} {:>9} {:>9}", "tensors", "count", "stored", "relative", "rms", "max");
    // What nothing happened to is counted, not listed.
    let exact = |row: &Row| matches!(row.error, Some((square, _, max)) if square == 0.0 && max == 0.0);
    let plain = |stored: &str| ["bfloat16", "float16", "float32"].contains(&stored);
    let mut quiet: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    rows.retain(|(_, stored), row| {
        let label = if exact(row) {
            "unchanged"
        } else if row.error.is_none() && plain(stored) {
            stored
        } else {
            return true;
        };
        let (kinds, count) = quiet.entry(label).or_default();
        (*kinds, *count) = (*kinds + 1, *count + row.tensors);
        false
    });
    for ((name, stored), row) in rows {
        let _ = write!(o, "{:<44} {:>7} {stored:<20}", printable(&name), row.tensors);
        let _ = match row.error {
            Some((square, norm, max)) => {
                let relative = if square == 0.0 { 0.0 } else { (square / norm).sqrt() };
                writeln!(o, " {relative:>9.2e} {:>9.2e} {max:>9.2e}", (square / row.parameters.max(1) as f64).sqrt())
            }
            None => writeln!(o, " {:>9} {:>9} {:>9}", "-", "-", "-"),
        };
    }
    for (label, (kinds, count)) in quiet {
        let _ = writeln!(o, "{:<44} {count:>7} {label:<20} {:>9} {:>9} {:>9}", format!("{kinds} kinds"), "-", "-", "-");
    }
    o.push('\n');
}

fn squares(e: &ErrorReport, n: u64) -> f64 {
    e.rms * e.rms * n as f64
}

fn norms(e: &ErrorReport, n: u64) -> f64 {
    if e.relative == 0.0 { 0.0 } else { squares(e, n) / (e.relative * e.relative) }
}

/// `model.layers.3.mlp` -> `layers.*.mlp`.
fn over_layers(name: &str) -> String {
    let Some(rest) = name.strip_prefix("model.layers.") else { return name.to_owned() };
    match rest.split_once('.') {
        Some((_, rest)) => format!("layers.*.{rest}"),
        None => name.to_owned(),
    }
}

fn environment(o: &mut String, e: &gptoss::verify::env::Environment) {
    line(o, "cpu", &format!("{}, {} processors ({})", e.cpu, e.cpus, e.cpu_features.join(" ")));
    line(o, "memory", &format!("{}, {} available", human(e.memory_bytes), human(e.memory_available_bytes)));
    line(o, "cuda driver", e.cuda_driver.as_deref().unwrap_or("none"));
    if e.gpus.is_empty() {
        line(o, "gpus", "none");
    }
    for g in &e.gpus {
        line(o, "gpu", &format!("{}, compute capability {}, {}", g.name, g.compute_capability, human(g.memory_bytes)));
    }
    match &e.nvcc {
        Some(n) => line(o, "nvcc", &format!("{} at {}", n.version, n.path)),
        None => line(o, "nvcc", "none"),
    }
    if e.kernels.is_empty() {
        line(o, "kernels", "none");
    }
    for k in &e.kernels {
        let state =
            if k.damage.is_empty() { "hashes match".into() } else { format!("DAMAGED: {}", k.damage.join("; ")) };
        line(o, "kernels", &format!("{} for {}, {state}", k.id, k.targets.join(";")));
    }
    line(o, "qqq", e.qqq.as_deref().unwrap_or("not among Python's packages"));
}
