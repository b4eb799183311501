//! Tensors that are no linear layer's weight: norms, biases, sinks, and what is made of them where they do not pass through.

use super::{Plan, Split, Work};
use crate::checkpoint::sink::Sink;
use crate::containers;
use crate::containers::dense::float_of;
use crate::error::Result;
use crate::formats::float::Float;
use crate::model::padding::Vector;
use crate::model::{Fused, Slot};
use crate::pipeline::copy;
use crate::pipeline::executor::Unit;

impl Plan<'_> {
    /// The type in which a float tensor that stays is written.
    pub(super) fn float_of(&self, tensor: &str) -> Result<Float> {
        let scaled = self.padding.is_some_and(|p| p.vector(tensor) == Vector::Norm);
        match self.source {
            _ if scaled => Ok(Float::F32),
            // A GGUF file has F32 where the model had BF16: what that holds goes back.
            Some(source) if source.is_gguf() && !self.is_gguf() => {
                let tensor = source.tensor(tensor)?;
                let float = float_of(&tensor)?;
                let whole = float == Float::F32
                    && tensor.bytes.as_chunks::<4>().0.iter().all(|b| u32::from_le_bytes(*b) & 0xffff == 0);
                Ok(if whole { Float::Bf16 } else { float })
            }
            Some(source) => float_of(&source.tensor(tensor)?),
            None => Ok(Float::Bf16),
        }
    }

    /// Whether the source, if there is one, has the tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.source.is_none_or(|s| s.get(name).is_some())
    }

    /// Whether a tensor that stays is written in another type than it has.
    pub(super) fn is_converted(&self, name: &str, float: Float) -> Result<bool> {
        self.source.map_or(Ok(false), |s| Ok(float_of(&s.tensor(name)?)? != float))
    }

    /// A norm's weight or a bias of a wider model.
    pub(super) fn vector(&mut self, slot: &Slot, to: usize) -> Result<()> {
        let Some(source) = self.source else { return Ok(()) };
        containers::vector(source, &slot.name, &slot.shape)?;
        let bytes = self.tensors[to].spec.byte_len() as u64;
        let work = Work::Vector { to, name: slot.name.clone() };
        self.units.push(Unit { group: slot.group, bytes, work });
        Ok(())
    }

    /// Writes a norm's weight or a bias.
    pub(super) fn write_vector(&self, to: usize, name: &str, sink: &Sink) -> Result<()> {
        let source = self.source.expect("weights are there in a run");
        let spec = &sink.layout().tensors[to].spec;
        let tensor = source.tensor(name)?;
        copy::check(&tensor, &(0..tensor.bytes.len()))?;
        let (values, _) = containers::vector(source, name, &spec.shape)?;
        let float = Float::of(spec.dtype).expect("floats were planned");
        let mut bytes = Vec::with_capacity(spec.byte_len());
        values.iter().for_each(|&v| float.write(v, &mut bytes));
        sink.write(to, 0, &bytes)
    }

    /// The biases of a layer's experts, gate and up interleaved.
    pub(super) fn biases_of(&self, fused: Fused, layer: usize) -> Result<Vec<f32>> {
        let source = self.source.expect("weights are there in a run");
        if let Some(tensor) = source.get(&format!("{}_bias", fused.name(layer))) {
            copy::check(&tensor, &(0..tensor.bytes.len()))?;
        }
        containers::expert_biases(source, &self.config, fused, layer)
    }

    /// Writes the biases of the experts of a layer into tensors from `to` on.
    pub(super) fn write_biases(
        &self,
        to: usize,
        (fused, layer): (Fused, usize),
        float: Float,
        split: Split,
        sink: &Sink,
    ) -> Result<()> {
        let all = self.biases_of(fused, layer)?;
        let width = if split.experts { fused.shape(&self.config).0 } else { all.len() };
        let mut number = to;
        for biases in all.chunks_exact(width) {
            // Without a split every number is taken.
            let whole = [(fused.parts()[0].0, 0, 1)];
            for &(_, first, step) in if split.projections { fused.parts() } else { &whole } {
                let mut bytes = Vec::new();
                biases.iter().skip(first).step_by(step).for_each(|&v| float.write(v, &mut bytes));
                sink.write(number, 0, &bytes)?;
                number += 1;
            }
        }
        Ok(())
    }
}
