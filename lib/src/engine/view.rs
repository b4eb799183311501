//! Stored weights as kernels see them: where a row's codes and scales lie, and what a code means.

use half::{bf16, f16};

use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::{FIFTHS, Trits};
use crate::formats::{mx, mxfp4};

/// Columns that share one scale of the inputs, and at least one of the weight.
pub const GROUP: usize = 32;

/// What codes mean, and how they lie in a unit, the smallest part of a row that begins at a whole byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// E2M1, 32 columns in 16 bytes, column 2 b in the low half of byte b, 2 b + 1 in the high one: OpenAI's blocks.
    E2m1,
    /// E2M1, byte b of 16 has columns b and b + 16: ggml's blocks.
    E2m1Halves,
    /// 4 bits with 8 added, as [`Self::E2m1`] lies: compressed-tensors.
    Int4,
    /// 4 bits with 8 added, as [`Self::E2m1Halves`] lies: ggml's Q4_0.
    Int4Halves,
    /// 8 bits, -128 to 127.
    Int8,
    /// The same with 128 added: compressed-tensors.
    Int8Offset,
    /// 2 bits with 2 added, four columns a byte, low bits first: compressed-tensors.
    Int2,
    /// The same with 1 added, so -1, 0 and 1.
    Ternary,
    /// -1, 0 and 1, five a byte, 320 columns in 64 bytes as [`Trits::Fifths`] says; the last ones may be less than a unit.
    Base3,
    /// -1, 0 and 1, 256 columns in 64 bytes: in each half byte b has columns b, b + 32, b + 64, b + 96. ggml's TQ2_0.
    Tq2,
    /// E4M3, one byte.
    E4m3,
    /// One number.
    Bf16,
    /// One number.
    F16,
    /// One number.
    F32,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::E2m1,
        Self::E2m1Halves,
        Self::Int4,
        Self::Int4Halves,
        Self::Int8,
        Self::Int8Offset,
        Self::Int2,
        Self::Ternary,
        Self::Base3,
        Self::Tq2,
        Self::E4m3,
        Self::Bf16,
        Self::F16,
        Self::F32,
    ];

    /// Whether inputs stay floats.
    pub fn is_float(self) -> bool {
        matches!(self, Self::E4m3 | Self::Bf16 | Self::F16 | Self::F32)
    }

    /// Columns of a unit.
    pub const fn unit(self) -> usize {
        match self {
            Self::Tq2 => 256,
            Self::Base3 => FIFTHS.0,
            _ => GROUP,
        }
    }

    /// Bytes of a unit's codes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::E2m1 | Self::E2m1Halves | Self::Int4 | Self::Int4Halves => 16,
            Self::Int8 | Self::Int8Offset | Self::E4m3 => 32,
            Self::Int2 | Self::Ternary => 8,
            Self::Tq2 => 64,
            Self::Base3 => FIFTHS.1,
            Self::Bf16 | Self::F16 => 64,
            Self::F32 => 128,
        }
    }

    /// What kernels leave added to an integer, so that it has no sign; 0 where they take it with its sign.
    /// `unsigned_bytes` is for those that have codes of 8 bits without sign too.
    pub const fn offset(self, unsigned_bytes: bool) -> i32 {
        match self {
            Self::Int8 | Self::Int8Offset if unsigned_bytes => 128,
            Self::E2m1 | Self::E2m1Halves => 12,
            Self::Int4 | Self::Int4Halves => 8,
            Self::Int2 => 2,
            Self::Ternary | Self::Base3 | Self::Tq2 => 1,
            _ => 0,
        }
    }

    /// What an integer stands for under a scale of 1: E2M1 values are halves.
    pub const fn step(self) -> f32 {
        match self {
            Self::E2m1 | Self::E2m1Halves => 0.5,
            _ => 1.0,
        }
    }

    /// The integer at `column` of a unit.
    ///
    /// # Panics
    /// For floats.
    #[inline(always)]
    pub fn integer(self, unit: &[u8], column: usize) -> i32 {
        let nibble = |byte: u8, high: bool| if high { byte >> 4 } else { byte & 15 };
        let quarter = |byte: u8, at: usize| i32::from(byte >> (2 * at) & 3);
        match self {
            Self::E2m1 => doubled(nibble(unit[column / 2], column % 2 == 1)),
            Self::E2m1Halves => doubled(nibble(unit[column % 16], column >= 16)),
            Self::Int4 => i32::from(nibble(unit[column / 2], column % 2 == 1)) - 8,
            Self::Int4Halves => i32::from(nibble(unit[column % 16], column >= 16)) - 8,
            Self::Int8 => i32::from(unit[column] as i8),
            Self::Int8Offset => i32::from(unit[column]) - 128,
            Self::Int2 => quarter(unit[column / 4], column % 4) - 2,
            Self::Ternary => quarter(unit[column / 4], column % 4) - 1,
            Self::Base3 => i32::from(Trits::Fifths.code(unit, FIFTHS.0, column)),
            Self::Tq2 => quarter(unit[column / 128 * 32 + column % 32], column % 128 / 32) - 1,
            Self::E4m3 | Self::Bf16 | Self::F16 | Self::F32 => panic!("floats are no integers"),
        }
    }

    /// The number at `column` of a unit, without its scale.
    ///
    /// # Panics
    /// For integers.
    #[inline(always)]
    pub fn float(self, unit: &[u8], column: usize) -> f32 {
        let two = || u16::from_le_bytes([unit[2 * column], unit[2 * column + 1]]);
        match self {
            Self::E4m3 => Minifloat::E4M3.value(unit[column]),
            Self::Bf16 => bf16::from_bits(two()).to_f32(),
            Self::F16 => f16::from_bits(two()).to_f32(),
            Self::F32 => f32::from_le_bytes(std::array::from_fn(|i| unit[4 * column + i])),
            _ => panic!("integers are no floats"),
        }
    }
}

/// Twice the value of an E2M1 code.
#[inline(always)]
fn doubled(code: u8) -> i32 {
    (2.0 * mxfp4::VALUES[usize::from(code)]) as i32
}

/// How a scale is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleKind {
    /// A byte e for 2^(e - 127); 255 is no number.
    E8m0,
    /// BF16.
    Bf16,
    /// F16.
    F16,
    /// F32.
    F32,
}

impl ScaleKind {
    /// Bytes of one.
    pub const fn size(self) -> usize {
        match self {
            Self::E8m0 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The scale at the start of `bytes`.
    #[inline(always)]
    pub fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Self::E8m0 => mx::scale(bytes[0]),
            Self::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }
}

/// Where the scales of a weight lie: that of row r and columns `group` g to `group` (g + 1) at r * `row` + g * `step`.
#[derive(Debug, Clone, Copy)]
pub struct Scales<'a> {
    /// How they are stored.
    pub kind: ScaleKind,
    /// From the first one on.
    pub bytes: &'a [u8],
    /// Bytes from a row's to the next row's; 0 where rows share.
    pub row: usize,
    /// Bytes from one to the next of a row.
    pub step: usize,
    /// Columns under one; all of the row where it has one only.
    pub group: usize,
}

/// A weight [rows, columns] in memory.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    kind: Kind,
    shape: (usize, usize),
    codes: &'a [u8],
    row: usize,
    step: usize,
    scales: Option<Scales<'a>>,
}

impl<'a> View<'a> {
    /// Codes whose row r and unit u lie at r * `row` + u * `step`. `None` where kernels cannot take them: columns that are no
    /// whole units, scales that change inside a group, or integers without scales.
    ///
    /// # Panics
    /// Where the bytes are fewer than that.
    pub fn new(
        kind: Kind,
        shape: (usize, usize),
        codes: &'a [u8],
        (row, step): (usize, usize),
        scales: Option<Scales<'a>>,
    ) -> Option<Self> {
        let (rows, columns) = shape;
        let part = if kind == Kind::Base3 { GROUP } else { kind.unit() };
        if rows == 0 || columns == 0 || scales.is_some_and(|s| s.group == 0) || !columns.is_multiple_of(part) {
            return None;
        }
        let end = |row: usize, step: usize, n: usize, size: usize| {
            let last = (rows - 1).checked_mul(row)?.checked_add((n - 1).checked_mul(step)?)?;
            last.checked_add(size)
        };
        let last = end(row, step, columns.div_ceil(kind.unit()), kind.bytes());
        assert!(
            last.is_some_and(|l| l <= codes.len()) && step >= kind.bytes(),
            "a row's units are where the caller says"
        );
        assert!(!kind.is_float() || step == kind.bytes(), "floats lie side by side");
        match scales {
            None if !kind.is_float() => return None,
            None => {}
            Some(s) => {
                let groups = columns.div_ceil(s.group);
                // A float's scale is applied to the finished sum.
                let fits = if kind.is_float() { groups == 1 } else { s.group.is_multiple_of(GROUP) || groups == 1 };
                if !fits {
                    return None;
                }
                let last = end(s.row, s.step, groups, s.kind.size());
                assert!(last.is_some_and(|l| l <= s.bytes.len()), "every row has its scales");
            }
        }
        Some(Self { kind, shape, codes, row, step, scales })
    }

    /// What the codes mean.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// (out_features, in_features).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Every `step`-th row from `first` on.
    ///
    /// # Panics
    /// Where there is no such row.
    pub fn lane(&self, first: usize, step: usize) -> Self {
        assert!(first < self.shape.0 && step > 0, "a lane has rows");
        let scales = self.scales.map(|s| Scales { bytes: &s.bytes[first * s.row..], row: s.row * step, ..s });
        let shape = ((self.shape.0 - first).div_ceil(step), self.shape.1);
        Self { codes: &self.codes[first * self.row..], row: self.row * step, shape, scales, ..*self }
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.shape.1 / GROUP
    }

    /// The codes of unit `u` of row `r`.
    #[inline(always)]
    pub fn unit(&self, r: usize, u: usize) -> &'a [u8] {
        &self.codes[r * self.row + u * self.step..][..self.kind.bytes()]
    }

    /// Where row `r` begins: a pointer to all that follows.
    #[inline(always)]
    pub fn row_start(&self, r: usize) -> *const u8 {
        self.codes[r * self.row..].as_ptr()
    }

    /// Where row `r` begins with the scale of its first block: a pointer to all that follows.
    ///
    /// # Panics
    /// Where there are no scales. [`Self::in_blocks`] says whether codes follow.
    #[inline(always)]
    pub fn block_start(&self, r: usize) -> *const u8 {
        let scales = self.scales.as_ref().expect("blocks have scales");
        scales.bytes[r * scales.row..].as_ptr()
    }

    /// Bytes from a row to the next.
    pub fn row(&self) -> usize {
        self.row
    }

    /// Bytes from a unit to the next.
    pub fn step(&self) -> usize {
        self.step
    }

    /// The scale of row `r` at `column`; 1 where there is none.
    #[inline(always)]
    pub fn scale(&self, r: usize, column: usize) -> f32 {
        self.scales.map_or(1.0, |s| s.kind.read(&s.bytes[r * s.row + column / s.group * s.step..]))
    }

    /// Where the scales lie.
    pub fn scales(&self) -> Option<&Scales<'a>> {
        self.scales.as_ref()
    }

    /// Whether each group's codes follow its scale, of this kind, and nothing else lies between: ggml's blocks.
    pub fn in_blocks(&self, kind: ScaleKind) -> bool {
        self.scales.is_some_and(|s| {
            let same = s.kind == kind && s.group == GROUP && s.step == self.step && s.row == self.row;
            let same = same && s.bytes.len() >= self.codes.len() + kind.size();
            same && self.step == kind.size() + self.kind.bytes()
                && s.bytes.as_ptr().wrapping_add(kind.size()) == self.codes.as_ptr()
        })
    }

    /// Bytes of codes of one row.
    pub fn row_bytes(&self) -> usize {
        self.shape.1.div_ceil(self.kind.unit()) * self.kind.bytes()
    }
}
