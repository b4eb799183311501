//! What the kernels must give, one output at a time, on this processor.

use std::ops::Range;

use crate::formats::float::Float;
use crate::formats::minifloat::Minifloat;
use crate::formats::mx;

use super::product::{Codes, Parts, Product};

/// A linear layer in this machine's memory, as its checkpoint has it.
pub struct Layer<'a> {
    /// What its codes are.
    pub product: Product,
    /// [N, K], two a byte where they have four bits.
    pub codes: &'a [u8],
    /// [N, K / group]: bytes of E8M0, or of floats.
    pub scales: &'a [u8],
    /// Of the scales.
    pub scale_type: Float,
    /// [N].
    pub bias: Option<&'a [f32]>,
    /// Columns.
    pub k: usize,
    /// Columns of a scale.
    pub group: usize,
}

/// The inputs of a token.
#[derive(Clone, Copy)]
pub enum Token<'a> {
    /// Codes and their scale.
    Int8(&'a [i8], f32),
    /// Numbers that bf16 has.
    Bf16(&'a [f32]),
}

/// An output.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// In the order that kernels/gemm.cuh states: for int8 inputs every bit is the kernel's.
    pub stated: f32,
    /// In f64.
    pub exact: f64,
    /// The sum of the sizes of its parts, which bounds what rounding may do.
    pub size: f64,
}

/// gpt-oss's gated unit.
pub fn swiglu(gate: f32, up: f32, (alpha, limit): (f32, f32)) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    let up = up.clamp(-limit, limit);
    (up + 1.0) * (gate / (1.0 + (-alpha * gate).exp()))
}

impl Layer<'_> {
    /// The value of a code, and how many times it a kernel with int8 inputs has.
    fn code(&self, row: usize, column: usize) -> (f64, f32) {
        let nibble = |byte: u8| if column.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
        let at = row * self.k + column;
        match self.product.codes {
            Codes::E2m1 => (f64::from(Minifloat::E2M1.value(nibble(self.codes[at / 2]))), 2.0),
            Codes::Int4 => (f64::from(nibble(self.codes[at / 2])) - 8.0, 16.0),
            Codes::Int8 => (f64::from(self.codes[at] as i8), 1.0),
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        let at = row * (self.k / self.group) + group;
        if self.product.codes == Codes::E2m1 {
            return mx::scale(self.scales[at]);
        }
        let (mut scale, size) = ([0f32], self.scale_type.size());
        self.scale_type.read(&self.scales[at * size..][..size], &mut scale);
        scale[0]
    }

    /// The sum of the products of some columns, exact, and of their sizes; how many times it a kernel with int8 inputs has.
    fn sum(&self, row: usize, token: Token, columns: Range<usize>) -> (f64, f64, f32) {
        let (mut sum, mut sizes, mut multiple) = (0f64, 0f64, 1f32);
        for c in columns {
            let (value, times) = self.code(row, c);
            let product = match token {
                Token::Int8(codes, _) => {
                    multiple = times;
                    value * f64::from(codes[c])
                }
                Token::Bf16(numbers) => value * f64::from(numbers[c]),
            };
            sum += product;
            sizes += product.abs();
        }
        (sum, sizes, multiple)
    }

    /// What some columns contribute to an output, exact but for the conversion to f64.
    pub fn share(&self, row: usize, token: Token, columns: Range<usize>) -> f64 {
        let of_token = if let Token::Int8(_, scale) = token { f64::from(scale) } else { 1.0 };
        let one = |c: usize| self.sum(row, token, c..c + 1).0 * f64::from(self.scale(row, c / self.group));
        columns.map(one).sum::<f64>() * of_token
    }

    /// Output `row` for a token.
    pub fn output(&self, row: usize, token: Token) -> Output {
        let columns = Parts::of(self.k, self.group).columns();
        let (mut total, mut chain) = (None, 0f32);
        let (mut exact, mut size, mut step) = (0f64, 0f64, 1f32);
        for (g, first) in (0..self.k).step_by(self.group).enumerate() {
            // A part that has whole groups is a chain of its own.
            if columns >= self.group && first > 0 && first.is_multiple_of(columns) {
                total = Some(total.map_or(chain, |t: f32| t + chain));
                chain = 0.0;
            }
            let (sum, sizes, multiple) = self.sum(row, token, first..first + self.group);
            let times = |sum: f64| (sum * f64::from(multiple)) as f32;
            let stated = match token {
                // Parts of a group of floats are added in f32.
                Token::Bf16(_) if columns < self.group => (first..first + self.group)
                    .step_by(columns)
                    .map(|c| times(self.sum(row, token, c..(c + columns).min(first + self.group)).0))
                    .reduce(|a, b| a + b)
                    .unwrap_or(0.0),
                _ => times(sum),
            };
            let scale = self.scale(row, g);
            step = 1.0 / multiple;
            chain = stated.mul_add(scale, chain);
            exact += sum * f64::from(scale);
            size += (sizes * f64::from(scale)).abs();
        }
        let mut stated = total.map_or(chain, |t| t + chain);
        if let Token::Int8(_, scale) = token {
            stated *= scale * step;
            exact *= f64::from(scale);
            size *= f64::from(scale).abs();
        }
        if let Some(bias) = self.bias {
            stated += bias[row];
            exact += f64::from(bias[row]);
            size += f64::from(bias[row]).abs();
        }
        Output { stated, exact, size }
    }
}
