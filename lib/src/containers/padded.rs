//! A linear layer of a padded model: that of the checkpoint, with zeros behind its rows and columns.

use std::ops::Range;

use super::{Rows, Weight};
use crate::algorithms::rtn::Codes;
use crate::containers::compressed_tensors::{Scheme, Strategy};
use crate::formats::NumberFormat;
use crate::formats::activations::Activations;
use crate::formats::float::Float;

/// Wraps `inner` where `shape` is wider than it.
pub fn pad(inner: Weight<'_>, shape: (usize, usize)) -> Weight<'_> {
    if inner.shape() == shape { inner } else { Box::new(Padded { inner, shape }) }
}

struct Padded<'a> {
    inner: Weight<'a>,
    shape: (usize, usize),
}

impl Padded<'_> {
    /// Those of `rows` that are not padding.
    fn own(&self, rows: &Range<usize>) -> Range<usize> {
        let end = self.inner.shape().0;
        rows.start.min(end)..rows.end.min(end)
    }
}

impl Rows for Padded<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn float(&self) -> Float {
        self.inner.float()
    }

    fn inputs(&self) -> Activations {
        self.inner.inputs()
    }

    fn input_scale(&self) -> f32 {
        self.inner.input_scale()
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        let (own, width) = (self.own(&rows), self.inner.shape().1);
        let inside = columns.start.min(width)..columns.end.min(width);
        if own.is_empty() || inside.is_empty() {
            return;
        }
        if inside == columns {
            return self.inner.read(own.clone(), columns, &mut out[..own.len() * inside.len()]);
        }
        let mut part = vec![0f32; own.len() * inside.len()];
        self.inner.read(own, inside.clone(), &mut part);
        for (from, to) in part.chunks_exact(inside.len()).zip(out.chunks_exact_mut(columns.len())) {
            to[..inside.len()].copy_from_slice(from);
        }
    }

    fn stored(&self) -> Option<Scheme> {
        // A group that padding would fill up has another scale than one of zeros alone.
        let fits = |s: &Scheme| match s.strategy {
            Strategy::Group(n) => self.inner.shape().1.is_multiple_of(n) && self.shape.1.is_multiple_of(n),
            Strategy::Channel => true,
            Strategy::Tensor | Strategy::Block(..) => false,
        };
        self.inner.stored().filter(|s| fits(s) && s.weights != NumberFormat::Nvfp4)
    }

    fn codes(&self, rows: Range<usize>, out: &mut Codes) {
        let scheme = self.stored().expect("the caller has asked for it");
        let (narrow, wide) = (self.inner.shape().1, self.shape.1);
        let (groups, wider) = (narrow.div_ceil(scheme.group(narrow)), wide.div_ceil(scheme.group(wide)));
        let mut inner = Codes::default();
        self.inner.codes(self.own(&rows), &mut inner);
        // A scale of 0 is no scale in compressed-tensors' words: the format's own for zeros.
        let zero = scheme.weights.fit(0.0, 0.0, self.float(), 1.0);
        let code = scheme.weights.quantize(0.0, zero, self.float());
        out.codes.clear();
        out.codes.resize(rows.len() * wide, code);
        out.params.clear();
        out.params.resize(rows.len() * wider, zero);
        let rows = inner.codes.chunks_exact(narrow).zip(inner.params.chunks_exact(groups));
        for (row, (codes, params)) in rows.enumerate() {
            let (to, own) = (&mut out.codes[row * wide..(row + 1) * wide], &mut out.params[row * wider..][..wider]);
            to[..narrow].copy_from_slice(codes);
            own[..groups].copy_from_slice(params);
            // Columns behind a channel's own share its parameters.
            if groups == wider {
                to[narrow..].fill(scheme.weights.quantize(0.0, params[groups - 1], self.float()));
            }
        }
    }
}
