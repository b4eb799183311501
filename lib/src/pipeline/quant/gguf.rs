//! The plan of an output that is a GGUF file: its own names, one type a tensor, all experts of a projection in one.

use std::path::Path;

use safetensors::Dtype;

use super::store::{Place, Store};
use super::{Plan, Split, Work};
use crate::algorithms::rtn::Codes;
use crate::checkpoint::files;
use crate::checkpoint::gguf::{Storage, Value};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::sink::Sink;
use crate::checkpoint::source::TensorRef;
use crate::containers::compressed_tensors::{Activations, Scheme};
use crate::containers::dense::FLOATS;
use crate::containers::gguf;
use crate::containers::openai::Experts as Blocks;
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::int::IntFormat;
use crate::formats::minifloat::Minifloat;
use crate::formats::mxfp4::{BLOCK, BLOCK_BYTES};
use crate::formats::{MXFP4, NumberFormat};
use crate::model::{self, Fused, Linear, Proj, Role, Settings, Slot};
use crate::ops::dequantize;
use crate::pipeline::copy;
use crate::pipeline::executor::Unit;
use crate::text;

/// ggml's type for `scheme`.
///
/// # Errors
/// [`Error::Refused`] for what GGUF cannot hold, with what comes nearest.
pub(super) fn scheme(linear: &Linear, scheme: Scheme) -> Result<Scheme> {
    let weights = match scheme.weights {
        NumberFormat::Ggml(_) | NumberFormat::Half(_) => return Ok(scheme),
        MXFP4 if scheme.activations == Activations::Float => NumberFormat::Ggml(Ggml::Mxfp4),
        other => {
            let (module, name) = (linear.module(), other.name());
            return Err(Error::Refused(format!(
                "{module}: a GGUF file has no {name}; the nearest that it has is {}",
                nearest(other)
            )));
        }
    };
    Ok(Scheme { weights, ..scheme })
}

/// What of ggml's types comes nearest.
fn nearest(format: NumberFormat) -> &'static str {
    let IntFormat { num_bits, symmetric } = match format {
        NumberFormat::Int(int) => int,
        NumberFormat::Float(Minifloat::E2M1) | NumberFormat::Mx(Minifloat::E2M1) | NumberFormat::Nvfp4 => {
            return "mxfp4";
        }
        _ => return "q8_0",
    };
    match (num_bits, symmetric) {
        (2, _) => "tq2_0 (with --pad-to 256 where 256 does not divide a width)",
        (3 | 4, true) => "q4_0",
        (3 | 4, false) => "q4_1",
        (5, true) => "q5_0",
        (5, false) => "q5_1",
        _ => "q8_0",
    }
}

impl<'a> Plan<'a> {
    /// Header and places of the file.
    pub(super) fn gguf_layout(&self) -> Layout {
        Layout::gguf(self.tensors.clone(), &self.metadata, &self.described)
    }

    /// What the file says of the model and its tokenizer. Without weights the tokenizer may be missing.
    pub(super) fn gguf_metadata(&self, dir: &Path) -> Result<Vec<(String, Value)>> {
        let settings = Settings::parse(dir, &self.raw_config, &self.config)?;
        // Not the folder's name: an output does not depend on where its source lies.
        let name = self.config.known_name().unwrap_or(model::gguf::ARCHITECTURE);
        let mut keys = model::gguf::metadata(&self.config, &settings, name)?;
        keys.push(("general.file_type".into(), Value::U32(self.file_type())));
        if self.source.is_some() || files::is_there(&dir.join(text::tokenizer::TOKENIZER))? {
            keys.extend(text::gguf::metadata(dir, &self.raw_config, self.config.vocab)?);
        }
        Ok(keys)
    }

    /// llama.cpp's number for what most weights are, which is what the experts are.
    fn file_type(&self) -> u32 {
        let one = Linear { proj: Proj::Down, layer: 0, expert: 0 };
        match self.scheme(&one).map(|s| s.weights) {
            Some(NumberFormat::Ggml(ty)) => match ty {
                Ggml::Q4_0 => 2,
                Ggml::Q4_1 => 3,
                Ggml::Q8_0 => 7,
                Ggml::Q5_0 => 8,
                Ggml::Q5_1 => 9,
                Ggml::Tq1_0 => 36,
                Ggml::Tq2_0 => 37,
                Ggml::Mxfp4 => 38,
            },
            Some(NumberFormat::Half(Float::F16)) => 1,
            _ if self.mxfp4 && !self.treated.contains_key(&one) => 38,
            _ => match self.open(&one).map(|w| w.1) {
                Ok(Float::F32) => 0,
                Ok(Float::F16) => 1,
                _ => 32,
            },
        }
    }

    fn add_gguf(&mut self, group: usize, name: &str, storage: Storage, shape: &[usize]) -> usize {
        let (tensor, spec) = gguf::tensor(name, storage, shape);
        self.described.push(tensor);
        self.add(group, spec)
    }

    /// Plans a tensor of the model.
    pub(super) fn gguf_slot(&mut self, slot: &Slot) -> Result<()> {
        match slot.role {
            Role::Experts(fused, layer) => {
                fused.parts().iter().try_for_each(|p| self.gguf_experts(slot, fused, layer, p.0))
            }
            Role::ExpertBias(fused, layer) => self.gguf_biases(slot, fused, layer),
            Role::Weight(linear) if self.scheme(&linear).is_some() => {
                let scheme = self.scheme(&linear);
                let to = self.gguf_matrix(slot.group, &linear, scheme, &slot.shape)?;
                self.gguf_job(slot.group, linear, scheme, to)
            }
            // llama.cpp keeps these in F32, whatever the rest is.
            Role::Plain => self.gguf_floats(slot, Dtype::F32),
            Role::Weight(linear) if linear.proj == Proj::Router => self.gguf_floats(slot, Dtype::F32),
            Role::Weight(linear) if self.treated.contains_key(&linear) => {
                let to = self.gguf_matrix(slot.group, &linear, None, &slot.shape)?;
                self.gguf_job(slot.group, linear, None, to)
            }
            Role::Weight(_) => {
                let float = self.float_of(&slot.name)?;
                self.gguf_floats(slot, float.dtype())
            }
        }
    }

    /// A tensor of floats that stay, or become F32.
    fn gguf_floats(&mut self, slot: &Slot, dtype: Dtype) -> Result<()> {
        let to = self.add_gguf(slot.group, &slot.name, Storage::Float(dtype), &slot.shape);
        self.stay(slot, Float::of(dtype).expect("a float type").config_name());
        let Some(source) = self.source else { return Ok(()) };
        if self.is_padded() {
            return match slot.role {
                Role::Weight(linear) => self.gguf_rows(slot.group, linear, to),
                _ => self.vector(slot, to),
            };
        }
        let tensor = source.tensor(&slot.name)?;
        tensor.expect(&FLOATS, &slot.shape)?;
        let float = Float::of(dtype).expect("a float type");
        for range in copy::pieces(tensor.bytes.len(), 8) {
            let bytes = range.len() as u64;
            self.units.push(Unit { group: slot.group, bytes, work: Work::Convert { to, tensor, range, float } });
        }
        Ok(())
    }

    /// The tensor that a linear layer, or all experts' share of one projection, goes to.
    fn gguf_matrix(&mut self, group: usize, linear: &Linear, scheme: Option<Scheme>, shape: &[usize]) -> Result<usize> {
        let storage = match scheme.map(|s| s.weights) {
            Some(NumberFormat::Ggml(ty)) => Storage::Blocks(ty),
            Some(NumberFormat::Half(float)) => Storage::Float(float.dtype()),
            Some(other) => unreachable!("the plan turned {} into one of ggml's types", other.name()),
            None => Storage::Float(self.open(linear)?.1.dtype()),
        };
        Ok(self.add_gguf(group, &format!("{}.weight", gguf::module(linear)), storage, shape))
    }

    /// The job that brings the rows of `linear`.
    fn gguf_job(&mut self, group: usize, linear: Linear, scheme: Option<Scheme>, to: usize) -> Result<()> {
        let (weight, float) = self.open(&linear)?;
        let first = linear.expert * linear.shape(&self.config).0;
        let place = match scheme.map(|s| s.weights) {
            Some(NumberFormat::Ggml(ty)) => Place::Blocks { to, first, ty },
            _ => Place::Plain { to, first },
        };
        self.alone(group, linear, (weight, float), place);
        Ok(())
    }

    /// The rows of a float matrix of a wider model, in the type of tensor `to`.
    fn gguf_rows(&mut self, group: usize, linear: Linear, to: usize) -> Result<()> {
        let weight = self.open(&linear)?.0;
        let float = Float::of(self.tensors[to].spec.dtype).expect("a float type");
        self.alone(group, linear, (weight, float), Place::Plain { to, first: 0 });
        Ok(())
    }

    /// One projection of all experts of a layer.
    fn gguf_experts(&mut self, slot: &Slot, fused: Fused, layer: usize, proj: Proj) -> Result<()> {
        let each: Vec<Linear> = (0..self.config.experts).map(|expert| Linear { proj, layer, expert }).collect();
        let (out, inp) = each[0].shape(&self.config);
        let shape = [each.len(), out, inp];
        let stays = each.iter().all(|l| !self.treated.contains_key(l));
        if stays && self.mxfp4 {
            let name = format!("{}.weight", gguf::module(&each[0]));
            let to = self.add_gguf(slot.group, &name, Storage::Blocks(Ggml::Mxfp4), &shape);
            let report = Slot { name: gguf::module(&each[0]), shape: shape.to_vec(), ..slot.clone() };
            self.stay(&report, "mxfp4");
            if self.is_padded() {
                for linear in each {
                    let opened = self.open(&linear)?;
                    self.alone(
                        slot.group,
                        linear,
                        opened,
                        Place::Blocks { to, first: linear.expert * out, ty: Ggml::Mxfp4 },
                    );
                }
                return Ok(());
            }
            let Some(source) = self.source else { return Ok(()) };
            let blocks = Blocks::open(source, &self.config, fused, layer)?;
            let blocks = blocks.ok_or_else(|| Error::Refused(format!("{} has no MXFP4 blocks", slot.name)))?;
            for expert in 0..each.len() {
                let bytes = (out * inp / 2) as u64;
                let work = Work::Blocks { to, blocks: blocks.expert(expert), scales: blocks.scales, expert, proj };
                self.units.push(Unit { group: slot.group, bytes, work });
            }
            return Ok(());
        }
        let schemes: Vec<Option<Scheme>> = each.iter().map(|l| self.scheme(l)).collect();
        if let Some(other) = schemes.iter().position(|s| *s != schemes[0]) {
            let name = |s: Option<Scheme>| s.map_or("floats".to_owned(), |s| s.weights.name());
            return Err(Error::Refused(format!(
                "{} would be {} and {} {}, but in a GGUF file one tensor of one type holds a projection of all experts of a layer",
                each[0].module(),
                name(schemes[0]),
                each[other].module(),
                name(schemes[other])
            )));
        }
        let to = self.gguf_matrix(slot.group, &each[0], schemes[0], &shape)?;
        each.into_iter().try_for_each(|linear| self.gguf_job(slot.group, linear, schemes[0], to))
    }

    /// The biases of all experts of a layer: gate and up apart, F32.
    fn gguf_biases(&mut self, slot: &Slot, fused: Fused, layer: usize) -> Result<()> {
        let (out, _) = fused.shape(&self.config);
        let to = self.tensors.len();
        for &(proj, _, step) in fused.parts() {
            let name = format!("{}.bias", gguf::module(&Linear { proj, layer, expert: 0 }));
            self.add_gguf(slot.group, &name, Storage::Float(Dtype::F32), &[self.config.experts, out / step]);
        }
        self.stay(slot, "float32");
        let split = Split { experts: false, projections: true };
        self.bias_unit(slot, fused, layer, Work::Biases { to, fused, layer, float: Float::F32, split })
    }
}

/// Writes the rows of one projection of one expert, which stay MXFP4, as ggml's blocks.
pub(super) fn write_blocks(
    to: usize,
    (source, scales): (&dequantize::Blocks, &TensorRef),
    expert: usize,
    proj: Proj,
    sink: &Sink,
) -> Result<()> {
    let groups = source.groups;
    let all = source.rows * groups;
    copy::check(scales, &(expert * all..(expert + 1) * all))?;
    let fused = proj.fused().expect("an expert's projection");
    let &(_, first, step) = fused.parts().iter().find(|p| p.0 == proj).expect("a projection is in its fused tensor");
    let (rows, width) = (source.rows / step, Ggml::Mxfp4.row_bytes(groups * BLOCK));
    let piece = (copy::PIECE / width).max(1);
    let mut out = Vec::with_capacity(piece.min(rows) * width);
    for start in (0..rows).step_by(piece) {
        out.clear();
        for row in start..rows.min(start + piece) {
            let at = (first + row * step) * groups;
            let codes = &source.codes[at * BLOCK_BYTES..(at + groups) * BLOCK_BYTES];
            gguf::from_openai(codes, &source.scales[at..at + groups], &mut out);
        }
        sink.write(to, (expert * rows + start) * width, &out)?;
    }
    Ok(())
}

impl Store {
    /// The bytes of whole blocks of the rows from `row` on.
    pub(super) fn write_ggml(
        &self,
        (to, first, ty): (usize, usize, Ggml),
        row: usize,
        codes: &Codes,
        sink: &Sink,
    ) -> Result<()> {
        sink.write(to, (first + row) * ty.row_bytes(self.shape.1), &gguf::pack(codes, ty))
    }
}
