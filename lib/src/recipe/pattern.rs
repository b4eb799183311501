//! Names of modules: `re:` and a regular expression that must match from the start, as compressed-tensors has it; `glob:`
//! and a shell pattern for the whole name, as Python's fnmatch has it; or whole name components anywhere in the name
//! (`mlp.router`, `layers.0`, `q_proj`).
//!
//! A glob may also speak of the experts as transformers stores them, all of a layer in one: `*.mlp.experts.gate_up_proj` is
//! gate and up of every expert, `*.mlp.experts.down_proj` every down, `*.mlp.experts` all three. A `*` goes across dots.

use std::cell::RefCell;
use std::collections::HashMap;

use regex_lite::Regex;

use crate::error::{Error, Result};

thread_local! {
    /// A model has thousands of modules and a handful of patterns: each is compiled once.
    static COMPILED: RefCell<HashMap<String, Patterns>> = RefCell::default();
}

/// True where `pattern` matches `module`.
pub fn matches(pattern: &str, module: &str) -> Result<bool> {
    COMPILED.with_borrow_mut(|compiled| {
        if let Some(patterns) = compiled.get(pattern) {
            return Ok(patterns.any(module));
        }
        let patterns = Patterns::new(&[pattern.to_owned()])?;
        let matches = patterns.any(module);
        compiled.insert(pattern.to_owned(), patterns);
        Ok(matches)
    })
}

/// Many patterns, compiled once.
pub struct Patterns {
    list: Vec<Pattern>,
}

enum Pattern {
    /// `re:`
    Regex(Regex),
    /// `glob:`
    Glob(Vec<Piece>),
    /// Name components.
    Name(String),
}

/// A part of a glob.
enum Piece {
    /// `*`
    Any,
    /// `?`
    One,
    /// `[a-c]`, or with `!` in front none of them.
    Set { not: bool, ranges: Vec<(char, char)> },
    /// Itself.
    Char(char),
}

impl Patterns {
    /// Compiles `patterns`.
    pub fn new(patterns: &[String]) -> Result<Self> {
        let list = patterns.iter().map(|p| Pattern::new(p)).collect::<Result<_>>()?;
        Ok(Self { list })
    }

    /// Numbers of the patterns that match `module`.
    pub fn hits<'a>(&'a self, module: &'a str) -> impl Iterator<Item = usize> + 'a {
        self.list.iter().enumerate().filter(move |(_, p)| p.matches(module)).map(|(i, _)| i)
    }

    /// True where any matches.
    pub fn any(&self, module: &str) -> bool {
        self.hits(module).next().is_some()
    }
}

impl Pattern {
    fn new(text: &str) -> Result<Self> {
        if let Some(re) = text.strip_prefix("re:") {
            let error = |e| Error::Refused(format!("{text:?} is no regular expression: {e}"));
            return Regex::new(&format!("^(?:{re})")).map(Self::Regex).map_err(error);
        }
        Ok(match text.strip_prefix("glob:") {
            Some(glob) => Self::Glob(pieces(glob)),
            None => Self::Name(text.to_owned()),
        })
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Regex(re) => re.is_match(module),
            Self::Glob(pieces) => {
                let chars = |s: &str| s.chars().collect::<Vec<_>>();
                glob(pieces, &chars(module)) || fused(module).iter().flatten().any(|name| glob(pieces, &chars(name)))
            }
            Self::Name(name) => {
                let n = name.split('.').count();
                let parts: Vec<&str> = module.split('.').collect();
                parts.windows(n).any(|w| name.split('.').eq(w.iter().copied()))
            }
        }
    }
}

/// What transformers calls the tensor and the module that hold an expert's layer.
fn fused(module: &str) -> Option<[String; 2]> {
    let (rest, proj) = module.rsplit_once('.')?;
    let (experts, _) = rest.rsplit_once('.').filter(|(experts, _)| experts.ends_with(".mlp.experts"))?;
    let proj = if proj == "down_proj" { proj } else { "gate_up_proj" };
    Some([format!("{experts}.{proj}"), experts.to_owned()])
}

/// A bracket that is not closed stands for itself.
fn pieces(glob: &str) -> Vec<Piece> {
    let chars: Vec<char> = glob.chars().collect();
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        at += 1;
        pieces.push(match c {
            '*' => Piece::Any,
            '?' => Piece::One,
            '[' => match set(&chars[at..]) {
                Some((piece, length)) => {
                    at += length;
                    piece
                }
                None => Piece::Char(c),
            },
            c => Piece::Char(c),
        });
    }
    pieces
}

/// What stands between brackets, and its length with the closing one. A `]` in the first place is one of the set.
fn set(rest: &[char]) -> Option<(Piece, usize)> {
    let not = rest.first() == Some(&'!');
    let start = usize::from(not);
    let end = start + 1 + rest.get(start + 1..)?.iter().position(|&c| c == ']')?;
    let mut inner = &rest[start..end];
    let mut ranges = Vec::new();
    while let [first, tail @ ..] = inner {
        (ranges, inner) = match tail {
            ['-', last, tail @ ..] => ([ranges, vec![(*first, *last)]].concat(), tail),
            _ => ([ranges, vec![(*first, *first)]].concat(), tail),
        };
    }
    Some((Piece::Set { not, ranges }, end + 1))
}

/// Whether the whole of `text` matches: each `*` takes as little as it can, and one more each time the rest fails.
fn glob(pieces: &[Piece], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        let fits = match (pieces.get(p), text.get(t)) {
            (None, None) => return true,
            (Some(Piece::Any), _) => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            (Some(Piece::One), Some(_)) => true,
            (Some(Piece::Char(a)), Some(b)) => a == b,
            (Some(Piece::Set { not, ranges }), Some(c)) => ranges.iter().any(|(a, b)| (a..=b).contains(&c)) != *not,
            _ => false,
        };
        (p, t) = match (fits, star) {
            (true, _) => (p + 1, t + 1),
            (false, Some((after, from))) if from < text.len() => {
                star = Some((after, from + 1));
                (after, from + 1)
            }
            _ => return false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_match_whole_and_expressions_from_the_start() {
        let m = "model.layers.1.mlp.experts.12.gate_proj";
        for (p, want) in [
            ("mlp.experts", true),
            ("experts.12", true),
            ("experts.1", false),
            ("gate", false),
            ("re:.*gate_proj$", true),
            ("re:gate_proj", false),
            (r"re:model\.layers\.1\.", true),
        ] {
            assert_eq!(matches(p, m).unwrap(), want, "{p}");
            assert_eq!(Patterns::new(&[p.to_owned()]).unwrap().any(m), want, "{p}");
        }
        assert!(Patterns::new(&["re:(".into()]).is_err());
    }

    #[test]
    fn globs_match_whole_names_as_fnmatch_does() {
        let (gate, down) = ("model.layers.1.mlp.experts.12.gate_proj", "model.layers.1.mlp.experts.12.down_proj");
        for (p, of_gate, of_down) in [
            ("*", true, true),
            ("model.layers.*", true, true),
            ("layers.*", false, false),
            ("*experts.*.gate_proj", true, false),
            ("*.1?.[a-g]*_proj", true, true),
            ("*.1?.[!d]*_proj", true, false),
            ("*.mlp.experts.gate_up_proj", true, false),
            ("*.mlp.experts.down_proj", false, true),
            ("model.layers.1.mlp.experts", true, true),
            ("model.layers.0.mlp.experts", false, false),
            ("*[", false, false),
            (gate, true, false),
        ] {
            let patterns = Patterns::new(&[format!("glob:{p}")]).unwrap();
            assert_eq!((patterns.any(gate), patterns.any(down)), (of_gate, of_down), "{p}");
        }
        assert!(matches("glob:a[]b]c", "a]c").unwrap() && !matches("glob:**x*y", "axbz").unwrap());
    }
}
