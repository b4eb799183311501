//! The ratios of a measurement of products as an SVG: a panel a device and layer, a line a kernel, M to the right on a scale of powers of two.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, bail};
use gptoss::bench::GemmRow;

/// Width and height of a panel with its labels, of what is drawn in it, and where that begins.
const PANEL: (f64, f64) = (380.0, 260.0);
const AREA: (f64, f64) = (300.0, 180.0);
const CORNER: (f64, f64) = (50.0, 40.0);
/// Panels side by side.
const COLUMNS: usize = 3;
/// Colours that people who see few of them can tell apart (Okabe and Ito 2008).
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

/// Whether `path` is one that [`write`] can write.
pub fn check(path: &Path) -> Result<()> {
    let svg = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("svg"));
    if !svg {
        bail!("--plot {}: wanted a name that ends in .svg", path.display());
    }
    Ok(())
}

/// Draws `rows` into `path`.
pub fn write(path: &Path, rows: &[GemmRow]) -> Result<()> {
    std::fs::write(path, svg(rows))?;
    Ok(())
}

/// The names in `rows`, each once, in their order.
fn distinct<T: PartialEq>(rows: &[GemmRow], name: impl Fn(&GemmRow) -> T) -> Vec<T> {
    let mut names = Vec::new();
    for row in rows {
        let name = name(row);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn svg(rows: &[GemmRow]) -> String {
    let panels = distinct(rows, |r| (r.device.clone(), r.layer.clone()));
    let kernels = distinct(rows, |r| r.kernel.clone());
    let lines = panels.len().div_ceil(COLUMNS);
    let width = PANEL.0 * panels.len().min(COLUMNS) as f64;
    // Names of kernels wrap where a single panel is narrow.
    let a_line = ((width - 20.0) / 120.0) as usize;
    let legend = 20.0 * kernels.len().div_ceil(a_line) as f64;
    let height = PANEL.1 * lines as f64 + legend + 20.0;
    let mut o = String::new();
    let _ = writeln!(
        o,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">"#
    );
    let _ = writeln!(o, r#"<rect width="{width}" height="{height}" fill="white"/>"#);
    for (i, (device, layer)) in panels.iter().enumerate() {
        let own: Vec<&GemmRow> = rows.iter().filter(|r| r.device == *device && r.layer == *layer).collect();
        let corner = ((i % COLUMNS) as f64 * PANEL.0 + CORNER.0, (i / COLUMNS) as f64 * PANEL.1 + CORNER.1);
        let base = if device == "cpu" { "f32" } else { "cublas-f16" };
        panel(&mut o, &format!("{layer} on the {device}, times {base}"), corner, &own, &kernels);
    }
    for (i, kernel) in kernels.iter().enumerate() {
        let x = 20.0 + 120.0 * (i % a_line) as f64;
        let y = PANEL.1 * lines as f64 + 20.0 * (i / a_line) as f64 + 10.0;
        let colour = COLOURS[i % COLOURS.len()];
        let _ = writeln!(o, r#"<path d="M {x} {y} h 20" stroke="{colour}" stroke-width="2"/>"#);
        let _ = writeln!(o, r#"<text x="{}" y="{}">{}</text>"#, x + 25.0, y + 4.0, escaped(kernel));
    }
    o.push_str("</svg>\n");
    o
}

fn panel(o: &mut String, title: &str, (left, top): (f64, f64), rows: &[&GemmRow], kernels: &[String]) {
    let log = |m: usize| (m as f64).log2();
    let (low, high) = rows.iter().fold((f64::INFINITY, 0f64), |(l, h), r| (l.min(log(r.m)), h.max(log(r.m))));
    let most = rows.iter().filter_map(|r| r.speedup).fold(1f64, f64::max);
    // Whole steps, at most eight of them.
    let step = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|s| most / s <= 8.0).unwrap_or(100.0);
    let ceiling = (most / step).ceil() * step;
    let x = |m: usize| left + if high > low { (log(m) - low) / (high - low) } else { 0.5 } * AREA.0;
    let y = |ratio: f64| top + AREA.1 * (1.0 - ratio / ceiling);
    let _ = writeln!(
        o,
        r#"<text x="{left}" y="{}" font-size="13" font-weight="bold">{}</text>"#,
        top - 14.0,
        escaped(title)
    );
    for i in 0..=(ceiling / step).round() as usize {
        let ratio = i as f64 * step;
        let stroke = if ratio == 1.0 { "#888" } else { "#ddd" };
        let _ = writeln!(o, r#"<path d="M {left} {:.1} h {}" stroke="{stroke}"/>"#, y(ratio), AREA.0);
        let _ = writeln!(o, r#"<text x="{}" y="{:.1}" text-anchor="end">{ratio}</text>"#, left - 6.0, y(ratio) + 4.0);
    }
    let mut ms: Vec<usize> = rows.iter().map(|r| r.m).collect();
    ms.sort_unstable();
    ms.dedup();
    for m in ms {
        let _ = writeln!(o, r#"<text x="{:.1}" y="{}" text-anchor="middle">{m}</text>"#, x(m), top + AREA.1 + 16.0);
    }
    let _ = writeln!(o, r#"<text x="{}" y="{}" text-anchor="end">M</text>"#, left + AREA.0 + 20.0, top + AREA.1 + 16.0);
    for (i, kernel) in kernels.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let mut points: Vec<(usize, f64)> =
            rows.iter().filter(|r| r.kernel == *kernel).filter_map(|r| Some((r.m, r.speedup?))).collect();
        points.sort_by_key(|p| p.0);
        for (j, &(m, ratio)) in points.iter().enumerate() {
            let (px, py) = (x(m), y(ratio));
            let _ = writeln!(o, r#"<circle cx="{px:.1}" cy="{py:.1}" r="2.5" fill="{colour}"/>"#);
            if let Some(&(m, ratio)) = points.get(j + 1) {
                let d = format!("M {px:.1} {py:.1} L {:.1} {:.1}", x(m), y(ratio));
                let _ = writeln!(o, r#"<path d="{d}" stroke="{colour}" stroke-width="2"/>"#);
            }
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
