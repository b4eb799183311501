//! Documents -> sequences of ids, of which none is longer than the model is to see at once.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sample::shuffled;
use super::tokenizer::Tokenizer;
use crate::error::Result;

/// How documents become sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Documents, each with the separator behind it, are put one behind the other and cut into consecutive windows. What is
    /// left of the last window is dropped, unless it is the only one.
    Pack,
    /// One sequence a document, which loses what is too long.
    Truncate,
}

/// Ids that go through the model together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The text's ids, then those of padding.
    pub ids: Vec<u32>,
    /// How many of them are the text's.
    pub real: usize,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// Most ids in a sequence; at least 1.
    pub max_seq_length: usize,
    /// How documents become sequences.
    pub layout: Layout,
    /// Short sequences are filled to `max_seq_length`.
    pub pad: bool,
    /// Most sequences; all where `None`.
    pub samples: Option<usize>,
}

/// What became of the documents.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Windows {
    /// The sequences.
    pub sequences: Vec<Sequence>,
    /// Documents of which something was read.
    pub documents: usize,
    /// Ids in the sequences, without padding.
    pub tokens: usize,
    /// Ids that were read and are in no sequence: behind the cut of a document, or in the last window that is not full.
    pub dropped: usize,
}

/// Reads as many of `documents` as the sequences need.
pub fn windows(documents: impl Iterator<Item = Result<String>>, tokenizer: &Tokenizer, spec: Spec) -> Result<Windows> {
    let mut windows = match spec.layout {
        Layout::Pack => pack(documents, tokenizer, spec)?,
        Layout::Truncate => truncate(documents, tokenizer, spec)?,
    };
    windows.tokens = windows.sequences.iter().map(|s| s.real).sum();
    if spec.pad {
        let pad = tokenizer.pad()?;
        windows.sequences.iter_mut().for_each(|s| s.ids.resize(spec.max_seq_length, pad));
    }
    Ok(windows)
}

impl Spec {
    fn is_enough(&self, sequences: &[Sequence]) -> bool {
        self.samples.is_some_and(|n| sequences.len() >= n)
    }
}

impl Sequence {
    fn new(ids: Vec<u32>) -> Self {
        Self { real: ids.len(), ids }
    }
}

fn pack(documents: impl Iterator<Item = Result<String>>, tokenizer: &Tokenizer, spec: Spec) -> Result<Windows> {
    let separator = tokenizer.separator()?;
    let mut out = Windows::default();
    let mut waiting: Vec<u32> = Vec::new();
    let cut = |waiting: &mut Vec<u32>, sequences: &mut Vec<Sequence>| {
        let mut start = 0;
        while waiting.len() - start >= spec.max_seq_length && !spec.is_enough(sequences) {
            let end = start + spec.max_seq_length;
            sequences.push(Sequence::new(waiting[start..end].to_vec()));
            start = end;
        }
        waiting.drain(..start);
    };
    for document in documents {
        if spec.is_enough(&out.sequences) {
            return Ok(out);
        }
        let document = document?;
        out.documents += 1;
        for piece in tokenizer.pieces(&document) {
            waiting.extend(piece?);
            cut(&mut waiting, &mut out.sequences);
            if spec.is_enough(&out.sequences) {
                return Ok(out);
            }
        }
        waiting.push(separator);
        cut(&mut waiting, &mut out.sequences);
    }
    if out.sequences.is_empty() && !waiting.is_empty() && !spec.is_enough(&out.sequences) {
        out.sequences.push(Sequence::new(waiting));
    } else if !spec.is_enough(&out.sequences) {
        out.dropped = waiting.len();
    }
    Ok(out)
}

fn truncate(documents: impl Iterator<Item = Result<String>>, tokenizer: &Tokenizer, spec: Spec) -> Result<Windows> {
    let mut out = Windows::default();
    for document in documents {
        if spec.is_enough(&out.sequences) {
            break;
        }
        let (document, mut ids) = (document?, Vec::new());
        // The rest of a long document is not looked at.
        for piece in tokenizer.pieces(&document) {
            ids.extend(piece?);
            if ids.len() >= spec.max_seq_length {
                break;
            }
        }
        out.documents += 1;
        out.dropped += ids.len().saturating_sub(spec.max_seq_length);
        ids.truncate(spec.max_seq_length);
        if !ids.is_empty() {
            out.sequences.push(Sequence::new(ids));
        }
    }
    Ok(out)
}

/// Draws `samples` of the sequences, for a text that is one document.
pub fn draw(windows: Windows, samples: Option<usize>, seed: u64) -> Windows {
    let wanted = samples.unwrap_or(windows.sequences.len());
    let sequences: Vec<Sequence> = shuffled(windows.sequences, seed).take(wanted).collect();
    let tokens = sequences.iter().map(|s| s.real).sum();
    Windows { sequences, tokens, ..windows }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tiny-gpt-oss");

    fn make(documents: &[&str], spec: Spec) -> Windows {
        let tokenizer = Tokenizer::open(Path::new(TINY), 2048).unwrap();
        windows(documents.iter().map(|d| Ok((*d).to_owned())), &tokenizer, spec).unwrap()
    }

    const SPEC: Spec = Spec { max_seq_length: 4, layout: Layout::Pack, pad: false, samples: None };

    fn real(windows: &Windows) -> Vec<&[u32]> {
        windows.sequences.iter().map(|s| &s.ids[..s.real]).collect()
    }

    #[test]
    fn packing_cuts_the_stream_and_drops_the_rest() {
        // "1" and the like are one id each.
        let tokenizer = Tokenizer::open(Path::new(TINY), 2048).unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|t| tokenizer.id(t).unwrap());
        let e = 2041;
        let w = make(&["a", "b", "c", "a", "b"], SPEC);
        assert_eq!(real(&w), [[a, e, b, e], [c, e, a, e]]);
        assert_eq!((w.documents, w.tokens, w.dropped), (5, 8, 2));
        let w = make(&["a", "b", "c", "a", "b"], Spec { samples: Some(1), ..SPEC });
        assert_eq!((real(&w), w.documents, w.dropped), (vec![&[a, e, b, e][..]], 2, 0));
        // The only window may be short.
        let w = make(&["a"], Spec { pad: true, ..SPEC });
        assert_eq!(w.sequences, [Sequence { ids: vec![a, e, e, e], real: 2 }]);
        assert_eq!((w.tokens, w.dropped), (2, 0));
    }

    #[test]
    fn truncation_gives_one_sequence_a_document() {
        let w = make(&["a", "a b c d e f"], Spec { layout: Layout::Truncate, pad: true, ..SPEC });
        assert_eq!(w.sequences.iter().map(|s| (s.real, s.ids.len())).collect::<Vec<_>>(), [(1, 4), (4, 4)]);
        assert_eq!((w.documents, w.tokens), (2, 5));
        assert!(w.dropped > 0);
        let w = make(&["a", "b", "c"], Spec { layout: Layout::Truncate, samples: Some(2), ..SPEC });
        assert_eq!((w.sequences.len(), w.documents), (2, 2));
    }

    #[test]
    fn no_more_is_read_than_is_needed() {
        let tokenizer = Tokenizer::open(Path::new(TINY), 2048).unwrap();
        for layout in [Layout::Pack, Layout::Truncate] {
            let endless = std::iter::repeat_with(|| Ok("a b c".to_owned()));
            let w = windows(endless, &tokenizer, Spec { samples: Some(3), layout, ..SPEC }).unwrap();
            assert_eq!(w.sequences.len(), 3);
        }
    }

    #[test]
    fn drawn_windows_are_some_of_them() {
        let all = make(&["a b c d e f g h i j k l m"], SPEC);
        let some = draw(all.clone(), Some(2), 1);
        assert_eq!((some.sequences.len(), some.tokens), (2, 8));
        assert!(some.sequences.iter().all(|s| all.sequences.contains(s)));
        assert_eq!(some, draw(all.clone(), Some(2), 1));
        assert_eq!(draw(all.clone(), Some(99), 1).sequences.len(), all.sequences.len());
    }
}
