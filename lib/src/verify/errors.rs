//! Errors of single matrices, gathered into one line a family.

use std::collections::BTreeMap;

use crate::algorithms::rtn::ErrorSums;
use crate::manifest::{ErrorReport, TensorReport, Worst};
use crate::model::{Class, Linear, Proj};

/// Matrices that are reported together: a projection of a layer, over all its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Family {
    layer: usize,
    proj: Proj,
}

impl Family {
    /// The family of `linear`.
    pub fn of(linear: &Linear) -> Self {
        Self { layer: linear.layer, proj: linear.proj }
    }

    /// `model.layers.0.mlp.experts.*.gate_proj`.
    pub fn name(&self) -> String {
        let module = Linear { proj: self.proj, layer: self.layer, expert: 0 }.module();
        match self.proj.class() {
            Class::Experts => module.replacen(".experts.0.", ".experts.*.", 1),
            Class::Main => module,
        }
    }
}

/// `relative` of some sums: the norm of the difference over the norm of the original.
pub fn relative(s: &ErrorSums) -> f64 {
    let (error, weight): (f64, f64) = (s.squared_error.iter().sum(), s.squared_weight.iter().sum());
    // Something out of nothing is as wrong as can be, but JSON has no infinity.
    if error == 0.0 { 0.0 } else { (error / weight).sqrt().min(f64::MAX) }
}

/// One line a matrix.
pub fn each(matrices: impl Iterator<Item = (Linear, String, ErrorSums)>) -> Vec<TensorReport> {
    let line = |(linear, stored, sums): (Linear, String, ErrorSums)| TensorReport {
        name: linear.module(),
        tensors: 1,
        parameters: sums.count,
        stored,
        error: Some(summary(&sums, None)),
    };
    matrices.map(line).collect()
}

/// Sums as a report.
pub fn summary(s: &ErrorSums, worst: Option<Worst>) -> ErrorReport {
    let error: f64 = s.squared_error.iter().sum();
    let rms = (error / s.count.max(1) as f64).sqrt();
    let zeros = s.zeros.map(|n| n as f64 / s.count.max(1) as f64);
    ErrorReport { max: f64::from(s.max_error), rms, relative: relative(s), zeros, non_finite: s.non_finite, worst }
}

/// One line a family and way of being stored, from matrices in a fixed order.
pub fn report(matrices: impl Iterator<Item = (Linear, String, ErrorSums)>) -> Vec<TensorReport> {
    struct Line {
        tensors: u64,
        sums: ErrorSums,
        worst: Option<Worst>,
    }
    let mut lines: BTreeMap<(Family, String), Line> = BTreeMap::new();
    for (linear, stored, sums) in matrices {
        let line = lines.entry((Family::of(&linear), stored)).or_insert_with(|| Line {
            tensors: 0,
            sums: ErrorSums::default(),
            worst: None,
        });
        line.tensors += 1;
        line.sums.merge(&sums);
        let relative = relative(&sums);
        if linear.proj.class() == Class::Experts && line.worst.as_ref().is_none_or(|w| relative > w.relative) {
            line.worst = Some(Worst { name: linear.module(), relative });
        }
    }
    lines
        .into_iter()
        .map(|((family, stored), line)| TensorReport {
            name: family.name(),
            tensors: line.tensors,
            parameters: line.sums.count,
            stored,
            error: Some(summary(&line.sums, line.worst)),
        })
        .collect()
}
