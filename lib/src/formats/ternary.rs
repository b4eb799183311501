//! Ternary weights: -1, 0 and 1 under a scale, the mean of the group's absolute values or what an algorithm finds to be
//! better. Sources: Li et al. 2016, arXiv 1605.04711; Ma et al. 2024, arXiv 2402.17764 (absmean).

use super::float::Float;

/// How ternary codes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trits {
    /// Two bits, -1 = 00, 0 = 01, 1 = 10, four a byte, low bits first.
    Quarters,
    /// Base 3, five a byte: 1.6 bits. 320 columns are 64 bytes; byte b of them has a column of each run of 64. In a run, bytes
    /// 0 to 15 have columns 0 to 15, 16 to 31 columns 32 to 47, 32 to 47 columns 16 to 31, and 48 to 63 the rest, so that two
    /// groups of 32 lie in the halves of one register. A byte is a fraction of 256: times 3 the next digit stands above it.
    /// Columns behind the last whole block are stored in two bits where that is shorter than another block.
    Fifths,
}

/// Columns and bytes of a block of [`Trits::Fifths`].
pub const FIFTHS: (usize, usize) = (320, 64);

/// Columns of a run, all of whose digits have one place.
const RUN: usize = 64;

impl Trits {
    /// Bytes of a row of `columns` codes.
    pub const fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::Quarters => columns.div_ceil(4),
            Self::Fifths => {
                let whole = self.in_blocks(columns);
                whole.div_ceil(FIFTHS.0) * FIFTHS.1 + (columns - whole).div_ceil(4)
            }
        }
    }

    /// Columns of a row that lie in blocks of five a byte: all, or those of the whole blocks.
    pub const fn in_blocks(self, columns: usize) -> usize {
        let rest = columns % FIFTHS.0;
        match self {
            Self::Quarters => 0,
            Self::Fifths if rest.div_ceil(4) < FIFTHS.1 => columns - rest,
            Self::Fifths => columns,
        }
    }

    /// The code of `column` of a packed row of `columns`.
    #[inline(always)]
    pub fn code(self, row: &[u8], columns: usize, column: usize) -> i8 {
        let whole = self.in_blocks(columns);
        if column < whole {
            let block = &row[column / FIFTHS.0 * FIFTHS.1..][..FIFTHS.1];
            return digit(block[place(column % RUN)], column % FIFTHS.0 / RUN);
        }
        let behind = column - whole;
        (row[whole.div_ceil(FIFTHS.0) * FIFTHS.1 + behind / 4] >> (2 * (behind % 4)) & 3) as i8 - 1
    }

    /// Packs one row.
    pub fn pack(self, codes: &[i8], out: &mut Vec<u8>) {
        let (blocks, rest) = codes.split_at(self.in_blocks(codes.len()));
        for block in blocks.chunks(FIFTHS.0) {
            let mut numbers = [0u16; FIFTHS.1];
            for run in 0..FIFTHS.0 / RUN {
                for (at, number) in (0..RUN).map(|c| (run * RUN + c, place(c))) {
                    // Behind the row's end there are zeros.
                    let digit = block.get(at).map_or(1, |&c| (c + 1) as u16);
                    numbers[number] = numbers[number] * 3 + digit;
                }
            }
            out.extend(numbers.map(|n| (n * 256).div_ceil(243) as u8));
        }
        out.extend(rest.chunks(4).map(|c| c.iter().rev().fold(0, |b, &c| b << 2 | (c + 1) as u8)));
    }
}

/// The byte of a block that has a run's column `c`.
#[inline(always)]
const fn place(c: usize) -> usize {
    c / 32 * 16 + c % 32 / 16 * 32 + c % 16
}

/// Digit `run` of a byte, the first one greatest, as a code.
#[inline(always)]
pub fn digit(byte: u8, run: usize) -> i8 {
    let shifted = byte.wrapping_mul([1, 3, 9, 27, 81][run]);
    ((u16::from(shifted) * 3) >> 8) as i8 - 1
}

/// The mean of |w|, rounded to `float`; the least scale there is for zeros. Summed in eight lanes.
pub fn absmean<'w>(parts: impl Iterator<Item = &'w [f32]>, float: Float) -> f32 {
    let (mut lanes, mut count) = ([0f32; 8], 0);
    for part in parts {
        count += part.len();
        for chunk in part.chunks(8) {
            lanes.iter_mut().zip(chunk).for_each(|(l, w)| *l += w.abs());
        }
    }
    positive(lanes.iter().sum::<f32>() / count.max(1) as f32, float)
}

/// A scale as it is stored.
#[inline(always)]
pub fn positive(scale: f32, float: Float) -> f32 {
    let rounded = float.round(scale);
    if rounded == 0.0 { float.epsilon() } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_is_read_back(codes in prop::collection::vec(-1i8..=1, 1..1000)) {
            for trits in [Trits::Quarters, Trits::Fifths] {
                let mut row = Vec::new();
                trits.pack(&codes, &mut row);
                prop_assert_eq!(row.len(), trits.row_bytes(codes.len()));
                let back: Vec<i8> = (0..codes.len()).map(|c| trits.code(&row, codes.len(), c)).collect();
                prop_assert_eq!(&back, &codes);
            }
        }
    }

    #[test]
    fn two_bits_are_as_the_container_says() {
        let mut row = Vec::new();
        Trits::Quarters.pack(&[-1, 0, 1, -1, 1], &mut row);
        assert_eq!(row, [0b00_10_01_00, 0b10]);
        // Of gpt-oss's widths none has a rest in two bits.
        let sizes = [2880, 4096, 128, 320 + 252, 320 + 253].map(|n| Trits::Fifths.row_bytes(n));
        assert_eq!(sizes, [576, 832, 32, 64 + 63, 128]);
    }

    #[test]
    fn every_number_of_five_digits_is_read_back() {
        for number in 0..243u16 {
            let byte = (number * 256).div_ceil(243) as u8;
            for run in 0..5 {
                let want = number / 3u16.pow(4 - run as u32) % 3;
                assert_eq!(digit(byte, run), want as i8 - 1, "{number} {run}");
            }
        }
        let mut places: Vec<usize> = (0..RUN).map(place).collect();
        places.sort();
        assert_eq!(places, (0..RUN).collect::<Vec<_>>());
    }
}
