//! Inputs that are a little wrong: bytes and JSON tokens of good ones changed at random.
#![allow(dead_code, reason = "each test file uses its part")]

use super::random::Random;

/// Numbers at which readers go wrong.
const NUMBERS: [u64; 14] =
    [0, 1, 7, 31, 255, 256, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, u64::MAX];

/// What stands in place of a value of a text.
const VALUES: [&str; 19] = [
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "0",
    "-1",
    "1e400",
    "0.5",
    "NaN",
    "18446744073709551616",
    "9223372036854775807",
    "\"x\"",
    "[1]",
    "[[0]]",
    "{\"a\":1}",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "[0,0,0,0,0,0,0,0,0]",
];

/// One of `seeds` with one to four changes; what the others have may come into it.
pub fn mutate(random: &mut Random, seeds: &[Vec<u8>], text: bool) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(4) {
        if text && random.below(3) > 0 {
            change_token(random, &mut bytes);
        } else {
            change_bytes(random, &mut bytes, seeds);
        }
    }
    bytes
}

/// Changes a value, a name or a separator of what may be JSON or YAML.
fn change_token(random: &mut Random, bytes: &mut Vec<u8>) {
    let tokens = tokens(bytes);
    if tokens.is_empty() {
        return;
    }
    let (from, to) = tokens[random.below(tokens.len())];
    let other = tokens[random.below(tokens.len())];
    let with: Vec<u8> = match random.below(8) {
        0..3 => VALUES[random.below(VALUES.len())].into(),
        3 => NUMBERS[random.below(NUMBERS.len())].to_string().into(),
        4 => bytes[other.0..other.1].to_vec(),
        5 => Vec::new(),
        // Twice, with what stands behind it.
        6 => [&bytes[from..to], b",", &bytes[from..to]].concat(),
        _ => {
            let depth = [3, 70, 200, 5000][random.below(4)];
            if random.below(2) == 0 { b"[".repeat(depth) } else { b"{\"a\":".repeat(depth) }
        }
    };
    bytes.splice(from..to, with);
}

/// Strings, words and numbers, and what stands between.
fn tokens(bytes: &[u8]) -> Vec<(usize, usize)> {
    let (mut tokens, mut at) = (Vec::new(), 0);
    let word = |b: u8| b.is_ascii_alphanumeric() || b"_.-+".contains(&b);
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'"' => {
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
                at = (at + 1).min(bytes.len());
            }
            b if word(b) => {
                while at < bytes.len() && word(bytes[at]) {
                    at += 1;
                }
            }
            b => {
                at += 1;
                if b.is_ascii_whitespace() {
                    continue;
                }
            }
        }
        tokens.push((start, at));
    }
    tokens
}

fn change_bytes(random: &mut Random, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let at = random.below(bytes.len() + 1);
    let longest = [4, 16, 256][random.below(3)];
    let len = random.below(longest).min(bytes.len() - at);
    match random.below(8) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'\n'][random.below(8)],
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..at + len)),
        4 => {
            let again = bytes[at..at + len].to_vec();
            bytes.splice(at..at, again);
        }
        5 => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len() + 1);
            let part = other[from..(from + len).min(other.len())].to_vec();
            bytes.splice(at..at + len, part);
        }
        // A number as files of bytes have it.
        _ => {
            let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
            let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
    }
}
