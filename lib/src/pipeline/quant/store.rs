//! How the result of a linear layer gets into the output. The plan chooses a [`Store`] for each layer; whoever has
//! computed rows of it, by rounding alone or with calibration, hands them to [`Store::write`] and knows no layout.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::algorithms::rtn::Codes;
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::sink::Sink;
use crate::containers::compressed_tensors::Scheme;
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::mxfp4::{self, BLOCK};
use crate::ops::transpose;
use crate::pipeline::copy::PIECE;

/// Rows that are written at a time: a multiple of 32, so that zero points packed along the rows end on whole words.
pub(super) const ROWS: usize = 256;

/// Where one linear layer goes.
pub(super) struct Store {
    /// The layout.
    pub place: Place,
    /// (out_features, in_features).
    pub shape: (usize, usize),
    /// The type of scales, and of the numbers where these are stored.
    pub float: Float,
}

/// A layout, with the number of its first output tensor.
pub(super) enum Place {
    /// The tensors of one module in compressed-tensors' layout. Takes codes.
    CompressedTensors { to: usize, scheme: Scheme },
    /// One expert's rows in OpenAI's `_blocks` and, one tensor further, `_scales`. Takes MXFP4 codes.
    Native { to: usize, lane: Lane },
    /// One projection's rows of an expert's fused codes and, one tensor further, scales of type `scales`. Takes codes.
    Interleaved { to: usize, lane: Lane, scheme: Scheme, scales: Float },
    /// One expert's columns in the fused floats that transformers loads. Takes numbers, whole matrices only.
    Fused { to: usize, lane: Lane },
    /// Rows of `<module>.weight` from the first on. Takes numbers.
    Plain { to: usize, first: usize },
    /// Rows of a tensor of ggml's blocks from the first on. Takes codes.
    Blocks { to: usize, first: usize, ty: Ggml },
}

/// One projection's share of a tensor that holds all experts of a layer. Gate and up alternate there, by rows or by
/// columns, in runs that are too short to be written alone.
pub(super) struct Lane {
    pub expert: usize,
    /// 0 for gate and down, 1 for up.
    pub first: usize,
    /// 2 for gate and up, 1 for down.
    pub step: usize,
    /// What has come of the expert's gate and not yet of its up, or the other way round; both hold the same one.
    pub halves: Arc<Halves>,
}

/// The bytes of some rows for each tensor.
type Parts = Vec<Vec<u8>>;

/// Halves by first row.
type Halves = Mutex<BTreeMap<usize, Parts>>;

/// Rows of a layer's result. Dimension letters: R rows, K in_features.
#[derive(Clone, Copy)]
pub(super) enum Values<'v> {
    /// [R, K] with their parameters, of the format that the layer's scheme says.
    Codes(&'v Codes),
    /// f32 [R, K], finite.
    Numbers(&'v [f32]),
}

impl Store {
    /// Writes `rows` of the layer. Any thread may bring any rows, in any order, each row once, in ranges that begin at a
    /// multiple of 32 and end at one or with the layer; `Fused` takes all rows at once.
    ///
    /// Gate and up of an expert that share tensors (`Native`, `Fused`) must come in the same ranges: the first of the two
    /// waits in memory, in its stored form, and goes to the disk with the second. Bring them one right after the other,
    /// so that few wait.
    ///
    /// # Errors
    /// Where the output cannot be written.
    ///
    /// # Panics
    /// For numbers where the layer has codes, or the other way round.
    pub fn write(&self, rows: Range<usize>, values: Values, sink: &Sink) -> Result<()> {
        debug_assert!(rows.start.is_multiple_of(32) && (rows.end.is_multiple_of(32) || rows.end == self.shape.0));
        match (&self.place, values) {
            (Place::CompressedTensors { to, scheme }, Values::Codes(codes)) => {
                let mut parts = Vec::new();
                scheme.encode(codes, rows.start, self.shape, self.float, &mut parts);
                for (i, part) in parts.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
                    let whole = sink.layout().tensors[to + i].spec.byte_len();
                    sink.write(to + i, self.offset(&rows, part.len(), whole), part)?;
                }
                Ok(())
            }
            (&Place::Blocks { to, first, ty }, Values::Codes(codes)) => {
                self.write_ggml((to, first, ty), rows.start, codes, sink)
            }
            (Place::Plain { to, first }, Values::Numbers(numbers)) => {
                let mut bytes = Vec::with_capacity(numbers.len() * self.float.size());
                numbers.iter().for_each(|&v| self.float.write(v, &mut bytes));
                sink.write(*to, (first + rows.start) * self.shape.1 * self.float.size(), &bytes)
            }
            (Place::Native { to, lane }, Values::Codes(codes)) => {
                let scales = codes.params.iter().map(|p| mxfp4::scale_byte(p.scale)).collect();
                let parts = vec![mxfp4::pack(&codes.codes), scales];
                // A row of the fused matrix is what alternates.
                let before = (lane.expert * self.shape.0 + rows.start) * lane.step;
                lane.put(*to, rows.start, before, &[self.shape.1 / 2, self.shape.1 / BLOCK], parts, sink)
            }
            (Place::Interleaved { to, lane, scheme, scales }, Values::Codes(codes)) => {
                let mut parts = Vec::new();
                scheme.encode(codes, rows.start, self.shape, *scales, &mut parts);
                parts.truncate(2);
                let units: Vec<usize> = parts.iter().map(|p| p.len() / rows.len()).collect();
                lane.put(*to, rows.start, rows.start * lane.step, &units, parts, sink)
            }
            (Place::Fused { to, lane }, Values::Numbers(numbers)) => {
                assert_eq!(rows, 0..self.shape.0, "the fused floats are transposed, so a matrix comes whole");
                let mut bytes = vec![0; numbers.len() * self.float.size()];
                transpose::transposed(self.float, numbers, self.shape.1, &mut bytes);
                let before = lane.expert * self.shape.0 * self.shape.1 * lane.step;
                lane.put(*to, 0, before, &[self.float.size()], vec![bytes], sink)
            }
            _ => unreachable!("the plan gives a layer with a scheme a store for codes, and others one for numbers"),
        }
    }

    /// Whether [`Self::write`] wants codes, and not numbers.
    pub fn takes_codes(&self) -> bool {
        !matches!(self.place, Place::Fused { .. } | Place::Plain { .. })
    }

    /// Where the bytes of `rows` lie in a tensor of `whole` bytes. They may be packed along the rows, 32 at a time.
    fn offset(&self, rows: &Range<usize>, bytes: usize, whole: usize) -> usize {
        match rows.start {
            0 => 0,
            _ if rows.end == self.shape.0 => whole - bytes,
            start => start * bytes / rows.len(),
        }
    }

    /// Rows that one unit of work hands over.
    pub fn unit_rows(&self) -> usize {
        match self.place {
            Place::Fused { .. } => self.shape.0,
            Place::CompressedTensors { scheme, .. } => ROWS.next_multiple_of(scheme.step()),
            _ => ROWS,
        }
    }

    /// Bytes of working memory for one unit: rows, codes, what is made of them, and what waits for its other half.
    pub fn unit_bytes(&self) -> u64 {
        let numbers = self.unit_rows().min(self.shape.0) * self.shape.1;
        let each = match self.place {
            Place::Fused { .. } => 4 + 2 * self.float.size(),
            Place::Native { .. } | Place::Interleaved { .. } => 4 + 1 + 1 + 1 + 1,
            Place::CompressedTensors { .. } | Place::Plain { .. } | Place::Blocks { .. } => 4 + 1 + 1 + 1,
        };
        (numbers * each + PIECE) as u64
    }

    /// Bytes that the layer takes in the output.
    pub fn bytes(&self) -> usize {
        let numbers = self.shape.0 * self.shape.1;
        match &self.place {
            Place::CompressedTensors { scheme, .. } | Place::Interleaved { scheme, .. } => {
                scheme.specs("", self.shape, self.float).iter().map(TensorSpec::byte_len).sum()
            }
            Place::Native { .. } => numbers / 2 + numbers / BLOCK,
            Place::Blocks { ty, .. } => self.shape.0 * ty.row_bytes(self.shape.1),
            Place::Fused { .. } | Place::Plain { .. } => numbers * self.float.size(),
        }
    }
}

impl Lane {
    /// Writes `parts[i]`, units of `units[i]` bytes, to tensor `to + i` behind `before` units; with another half, once
    /// that is there too.
    fn put(&self, to: usize, row: usize, before: usize, units: &[usize], parts: Parts, sink: &Sink) -> Result<()> {
        if self.step == 1 {
            return parts.iter().enumerate().try_for_each(|(i, part)| sink.write(to + i, before * units[i], part));
        }
        let Some((gate, up)) = self.meet(row, parts) else { return Ok(()) };
        for (i, (gate, up)) in gate.iter().zip(&up).enumerate() {
            let (unit, mut at) = (units[i], before * units[i]);
            let piece = (PIECE / 2 / unit).max(1) * unit;
            for (gate, up) in gate.chunks(piece).zip(up.chunks(piece)) {
                let mut both = vec![0; 2 * gate.len()];
                transpose::interleave(unit, gate, up, &mut both);
                sink.write(to + i, at, &both)?;
                at += both.len();
            }
        }
        Ok(())
    }

    /// Leaves a half that comes first; gives both, gate in front, to the second.
    fn meet(&self, row: usize, parts: Parts) -> Option<(Parts, Parts)> {
        let mut halves = self.halves.lock().expect("no thread panics while it holds this");
        let Some(other) = halves.remove(&row) else {
            halves.insert(row, parts);
            return None;
        };
        Some(if self.first == 0 { (parts, other) } else { (other, parts) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::rtn::{Target, rtn};
    use crate::checkpoint::layout::{Layout, Planned};
    use crate::checkpoint::sink::Order;
    use crate::checkpoint::source::Checkpoint;
    use crate::checkpoint::source::SideFile;
    use crate::containers;
    use crate::formats::MXFP4;
    use crate::model::{Fused, Linear, ModelConfig, mxfp4_specs};
    use proptest::prelude::*;
    use serde_json::json;

    fn config(experts: usize, hidden: usize, intermediate: usize) -> ModelConfig {
        let (heads, kv_heads, head_dim, vocab) = (1, 1, 32, 32);
        ModelConfig {
            layers: 1,
            experts,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            attention_bias: true,
            tied: false,
        }
    }

    /// The stores of all experts' projections in their two fused tensors, and the tensors.
    fn stores(config: &ModelConfig, native: bool, float: Float) -> (Vec<(Linear, Store)>, Vec<Planned>) {
        let (mut stores, mut tensors) = (Vec::new(), Vec::new());
        for fused in [Fused::GateUp, Fused::Down] {
            let (to, (out, inp)) = (tensors.len(), fused.shape(config));
            let dense = TensorSpec::new(fused.name(0), float.dtype(), [config.experts, inp, out]);
            let specs = if native { mxfp4_specs(fused, 0, config).to_vec() } else { vec![dense] };
            tensors.extend(specs.into_iter().map(|spec| Planned { spec, group: 0 }));
            for expert in 0..config.experts {
                let halves = Arc::default();
                for &(proj, first, step) in fused.parts() {
                    let lane = Lane { expert, first, step, halves: Arc::clone(&halves) };
                    let place = if native { Place::Native { to, lane } } else { Place::Fused { to, lane } };
                    let linear = Linear { proj, layer: 0, expert };
                    stores.push((linear, Store { place, shape: linear.shape(config), float }));
                }
            }
        }
        (stores, tensors)
    }

    fn weights(linear: &Linear, (out, inp): (usize, usize), float: Float) -> Vec<f32> {
        let seed = linear.expert * 31 + linear.proj as usize * 7;
        (0..out * inp)
            .map(|i| float.round(((i + seed) as f32 * 0.71).sin() * 2f32.powi((i / 32 % 9) as i32 - 4)))
            .collect()
    }

    /// Writes every store's layer in ranges of `step` rows, the last first for every other layer.
    fn write_all(stores: &[(Linear, Store)], native: bool, step: usize, sink: &Sink) {
        let target = Target::new(MXFP4, BLOCK, Float::Bf16);
        let ranges = stores.iter().flat_map(|(linear, store)| {
            let (out, step) = (store.shape.0, if native { step } else { store.shape.0 });
            let mut ranges: Vec<_> = (0..out).step_by(step).map(|at| (linear, store, at..out.min(at + step))).collect();
            ranges.rotate_left(linear.proj as usize % 2);
            ranges
        });
        for (linear, store, rows) in ranges {
            let inp = store.shape.1;
            let w = &weights(linear, store.shape, store.float)[rows.start * inp..rows.end * inp];
            let mut codes = Codes::default();
            rtn(w, inp, target, Default::default(), &mut codes);
            let values = if native { Values::Codes(&codes) } else { Values::Numbers(w) };
            store.write(rows, values, sink).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn fused_experts_read_back_as_they_were_brought(
            native: bool,
            experts in 1usize..4,
            hidden in 1usize..5,
            intermediate in 1usize..5,
            step in 1usize..4,
            float in prop_oneof![Just(Float::Bf16), Just(Float::F16), Just(Float::F32)],
        ) {
            let float = if native { Float::Bf16 } else { float };
            let config = config(experts, hidden * 32, intermediate * 32);
            let (stores, tensors) = stores(&config, native, float);
            let dir = tempfile::tempdir().unwrap();
            let dst = dir.path().join("out");
            let sink = Sink::open(&dst, Layout::new(tensors, u64::MAX), "f", false, Order::Any).unwrap();
            write_all(&stores, native, step * 32, &sink);
            sink.finish_group(0, json!(null)).unwrap();
            let small = SideFile { name: "config.json".into(), bytes: b"{}".to_vec(), mode: None };
            sink.finish(vec![small], |_| Ok("{}".into())).unwrap();
            let checkpoint = Checkpoint::open(&dst).unwrap();
            for (linear, store) in &stores {
                let rows = containers::open(&checkpoint, &config, linear).unwrap();
                prop_assert_eq!((rows.shape(), rows.float()), (store.shape, float));
                let mut want = weights(linear, store.shape, float);
                if native {
                    let target = Target::new(MXFP4, BLOCK, float);
                    let mut codes = Codes::default();
                    rtn(&want, store.shape.1, target, Default::default(), &mut codes);
                    let value = |(i, &c)| target.format.dequantize(c, codes.params[i / BLOCK], float);
                    want = codes.codes.iter().enumerate().map(value).collect();
                }
                let mut have = vec![0f32; want.len()];
                rows.read_rows(0..store.shape.0, &mut have);
                for (i, (have, want)) in have.iter().zip(&want).enumerate() {
                    prop_assert_eq!(have.to_bits(), want.to_bits(), "{} {}", linear.module(), i);
                }
            }
        }
    }
}
