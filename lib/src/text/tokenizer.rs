//! `tokenizer.json` through the `tokenizers` crate, used as transformers uses it with `add_special_tokens=False`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tokenizers::models::ModelWrapper;

use super::config::SpecialTokens;
use crate::checkpoint::files;
use crate::error::{Error, Result};
use crate::guard::guarded;

/// Name of the file in a checkpoint's folder.
pub const TOKENIZER: &str = "tokenizer.json";
/// What gpt-oss puts between documents.
const END_OF_TEXT: &str = "<|endoftext|>";
/// Bytes after which a long text is cut, so that memory follows the piece and not the text.
const PIECE: usize = 1 << 16;
/// Bytes on either side of a cut that are looked at.
const CONTEXT: usize = 256;
/// Bytes to the next place that is tried, where a cut would change the tokens.
const STRIDE: usize = 1 << 10;

/// What is said where the tokenizers crate panics.
const PANICS: &str =
    "is no tokenizer that can be used: its parts do not fit each other; take it from the original checkpoint again";

/// Whether special tokens such as `<|end|>` are part of decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// They are written.
    Show,
    /// They are left out.
    Skip,
}

/// Text to ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    special: SpecialTokens,
    /// Added tokens that the model has no row for, with the number of its rows.
    beyond: BTreeMap<u32, String>,
    vocab: usize,
}

impl Tokenizer {
    /// Opens `dir/tokenizer.json` for a model whose `config.json` says `vocab_size` = `vocab`.
    ///
    /// A token of the vocabulary whose id the model does not have is an error: the two do not belong together. Added tokens
    /// beyond the model's rows are common (nobody resized the embedding), and an error only where a text has one.
    pub fn open(dir: &Path, vocab: usize) -> Result<Self> {
        let file = dir.join(TOKENIZER);
        if !files::is_there(&file)? {
            let reason = "is missing: text needs the model's tokenizer; copy it from the original checkpoint";
            return Err(Error::file(&file, reason));
        }
        let bytes = files::read(&file)?;
        let bad = |reason: String| Error::file(&file, reason);
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .ok_or_else(|| bad(PANICS.into()))?
            .map_err(|e| bad(format!("is no tokenizer that this version reads: {e}")))?;
        // transformers ignores both until a call asks for them.
        inner.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        inner.with_padding(None);
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some_and(|p| p > 0.0)
        {
            return Err(bad("has a BPE dropout, which tokenizes at random; set model.dropout to null".into()));
        }
        let greatest = inner.get_vocab(false).into_iter().max_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
        match greatest {
            None => return Err(bad("has no tokens".into())),
            Some((token, id)) if id as usize >= vocab => {
                return Err(bad(format!(
                    "token {token:?} has id {id}, but config.json's vocab_size is {vocab}: the tokenizer is another model's"
                )));
            }
            Some(_) => {}
        }
        let added = inner.get_added_tokens_decoder().into_iter();
        let beyond = added.filter(|(id, _)| *id as usize >= vocab).map(|(id, token)| (id, token.content)).collect();
        Ok(Self { inner, special: SpecialTokens::read(dir)?, file, beyond, vocab })
    }

    /// The ids of `text`. Special tokens that are spelled out in it become their ids; none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for piece in self.pieces(text) {
            ids.extend(piece?);
        }
        Ok(ids)
    }

    /// The ids of `text` piece by piece: together the same ids as those of the whole.
    ///
    /// A text is cut behind a newline, else where a word ends, and only where the neighbourhood has the same tokens with and
    /// without the cut.
    pub fn pieces<'a>(&'a self, text: &'a str) -> Pieces<'a> {
        Pieces { tokenizer: self, rest: text }
    }

    /// The text of `ids`, special tokens included. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, Special::Show)
    }

    /// Decodes ids one at a time.
    pub fn stream(&self, special: Special) -> Stream<'_> {
        Stream { tokenizer: self, special, ids: Vec::new(), told: 0 }
    }

    /// The id of a token by its exact name, such as `<|return|>`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The special tokens that `tokenizer_config.json` names.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The id behind each document: that of `<|endoftext|>`, else that of tokenizer_config.json's eos_token.
    pub fn separator(&self) -> Result<u32> {
        let eos = self.special.get("eos_token");
        self.id(END_OF_TEXT).or_else(|| self.id(eos?)).ok_or_else(|| {
            let eos = eos.map_or("tokenizer_config.json names no eos_token".into(), |t| {
                format!("the eos_token of tokenizer_config.json, {t:?}, is no token either")
            });
            Error::file(&self.file, format!("has no token {END_OF_TEXT} to put between documents, and {eos}"))
        })
    }

    /// The id that fills short sequences: that of tokenizer_config.json's pad_token, else the separator.
    pub fn pad(&self) -> Result<u32> {
        match self.special.get("pad_token").and_then(|t| self.id(t)) {
            Some(id) => Ok(id),
            None => self.separator(),
        }
    }

    fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            guarded(|| self.inner.encode_fast(text, false)).ok_or_else(|| Error::file(&self.file, PANICS))?;
        let encoding = encoding.map_err(|e| Error::file(&self.file, format!("cannot tokenize: {e}")))?;
        let ids = encoding.get_ids().to_vec();
        if !self.beyond.is_empty()
            && let Some(token) = ids.iter().find_map(|id| self.beyond.get(id))
        {
            let vocab = self.vocab;
            return Err(Error::file(
                &self.file,
                format!(
                    "the text has the added token {token:?}, for which the model has no row (vocab_size is {vocab}): take it out \
                     of the text, or call resize_token_embeddings on the model"
                ),
            ));
        }
        Ok(ids)
    }

    /// What to say of added tokens that the model has no rows for.
    pub fn remark(&self) -> Option<String> {
        let first = self.beyond.values().next()?;
        Some(format!(
            "tokenizer.json has {} added tokens beyond the model's vocab_size {}, {first:?} first: resize_token_embeddings was not \
             called; no text may have them",
            self.beyond.len(),
            self.vocab
        ))
    }

    fn decode_with(&self, ids: &[u32], special: Special) -> Result<String> {
        let decoded = guarded(|| self.inner.decode(ids, special == Special::Skip));
        let decoded = decoded.ok_or_else(|| Error::file(&self.file, PANICS))?;
        decoded.map_err(|e| Error::file(&self.file, format!("cannot decode: {e}")))
    }

    /// True where `text` has the same tokens when it is cut at `at`.
    fn cuts_well(&self, text: &str, at: usize) -> Result<bool> {
        let start = text.ceil_char_boundary(at.saturating_sub(CONTEXT));
        let end = text.floor_char_boundary((at + CONTEXT).min(text.len()));
        let (before, after) = (&text[start..at], &text[at..end]);
        // A run of blanks or dashes that leaves the context could be one token's.
        if !before.contains(char::is_alphanumeric) || !after.contains(char::is_alphanumeric) {
            return Ok(false);
        }
        let mut parts = self.encode_whole(before)?;
        parts.extend(self.encode_whole(after)?);
        Ok(parts == self.encode_whole(&text[start..end])?)
    }
}

/// Iterator of [`Tokenizer::pieces`].
#[derive(Debug)]
pub struct Pieces<'a> {
    tokenizer: &'a Tokenizer,
    rest: &'a str,
}

impl Pieces<'_> {
    /// Length of the next piece.
    fn cut(&self) -> Result<usize> {
        let mut from = PIECE;
        while from < self.rest.len() {
            // Behind a newline, else where a word ends: the merges of BPE do not cross from one word to the next.
            from = self.rest.ceil_char_boundary(from);
            let near = &self.rest[from..self.rest.ceil_char_boundary(from + STRIDE)];
            let newline = near.find('\n').map(|i| i + 1);
            let word_end = || {
                near.match_indices(|c: char| !c.is_alphanumeric())
                    .map(|(i, _)| i)
                    .find(|&i| near[..i].ends_with(char::is_alphanumeric))
            };
            if let Some(at) = newline.or_else(word_end).map(|i| from + i)
                && self.tokenizer.cuts_well(self.rest, at)?
            {
                return Ok(at);
            }
            from += STRIDE;
        }
        Ok(self.rest.len())
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Vec<u32>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let cut = match self.cut() {
            Ok(cut) => cut,
            Err(e) => {
                self.rest = "";
                return Some(Err(e));
            }
        };
        let (piece, rest) = self.rest.split_at(cut);
        self.rest = rest;
        Some(self.tokenizer.encode_whole(piece))
    }
}

/// Turns generated ids into text as they come, in whole characters.
#[derive(Debug)]
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    special: Special,
    /// Ids that were told last, as context, and those that are not told yet.
    ids: Vec<u32>,
    /// How many of `ids` were told.
    told: usize,
}

impl Stream<'_> {
    /// Ids that may wait for the rest of a character: it has at most four bytes, and each id brings one.
    const WAITING: usize = 4;

    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.emit(false)
    }

    /// What is left at the end: an incomplete character becomes U+FFFD.
    pub fn finish(mut self) -> Result<String> {
        self.emit(true)
    }

    fn emit(&mut self, all: bool) -> Result<String> {
        // Some tokenizers write a token differently at the start of a text, so the last ids are decoded with the new ones.
        let before = self.tokenizer.decode_with(&self.ids[..self.told], self.special)?;
        let now = self.tokenizer.decode_with(&self.ids, self.special)?;
        if !all && now.ends_with('\u{fffd}') && self.ids.len() - self.told < Self::WAITING {
            return Ok(String::new());
        }
        let new = now.strip_prefix(&before).map(str::to_owned);
        let new = match new {
            Some(new) => new,
            None => self.tokenizer.decode_with(&self.ids[self.told..], self.special)?,
        };
        self.ids.drain(..self.told);
        self.told = self.ids.len();
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tiny-gpt-oss");

    fn tiny() -> Tokenizer {
        Tokenizer::open(Path::new(TINY), 2048).unwrap()
    }

    fn changed(change: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let text = std::fs::read(Path::new(TINY).join(TOKENIZER)).unwrap();
        let mut value = serde_json::from_slice(&text).unwrap();
        change(&mut value);
        std::fs::write(dir.path().join(TOKENIZER), value.to_string()).unwrap();
        dir
    }

    #[test]
    fn text_comes_back_and_special_tokens_are_ids() {
        let tokenizer = tiny();
        let text = "fn main() {}<|endoftext|>日本 🔬\n\n  x";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == 2041).count(), 1);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!((tokenizer.separator().unwrap(), tokenizer.pad().unwrap()), (2041, 2041));
        assert_eq!((tokenizer.id("<|return|>"), tokenizer.id("<|nothing|>")), (Some(2042), None));
        assert!(tokenizer.encode("").unwrap().is_empty());
    }

    #[test]
    fn a_long_text_in_pieces_has_the_tokens_of_the_whole() {
        let tokenizer = tiny();
        let lines = std::fs::read_to_string(Path::new(TINY).join("test.jsonl")).unwrap();
        let text: String = lines
            .lines()
            .take(60)
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["text"].as_str().unwrap().to_owned() + "\n")
            .collect();
        assert!(text.len() > 3 * PIECE, "{}", text.len());
        assert!(tokenizer.pieces(&text).count() >= 3);
        assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_whole(&text).unwrap());
        // Without newlines, and without blanks.
        for text in [
            text.replace('\n', " "),
            "量子化された模型は、小さい。".repeat(PIECE / 8),
            text.replace(char::is_whitespace, ","),
        ] {
            assert!(tokenizer.pieces(&text).count() >= 3);
            assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_whole(&text).unwrap());
        }
        // Nowhere to cut.
        for hard in ["x".repeat(3 * PIECE), "\n".repeat(2 * PIECE), "-----\n".repeat(PIECE / 2)] {
            assert_eq!(tokenizer.encode(&hard).unwrap(), tokenizer.encode_whole(&hard).unwrap());
        }
    }

    #[test]
    fn a_stream_gives_whole_characters() {
        let tokenizer = tiny();
        let text = "日本🔬 ok<|end|>é";
        let ids = tokenizer.encode(text).unwrap();
        for (special, want) in [(Special::Show, text), (Special::Skip, "日本🔬 oké")] {
            let mut stream = tokenizer.stream(special);
            let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            assert!(parts.iter().all(|p| !p.contains('\u{fffd}')), "{parts:?}");
            assert!(parts.iter().any(String::is_empty), "{parts:?}");
            assert_eq!(parts.concat() + &stream.finish().unwrap(), want);
        }
        let mut stream = tokenizer.stream(Special::Show);
        assert_eq!(stream.push(ids[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn bytes_that_never_make_a_character_do_not_pile_up() {
        let tokenizer = tiny();
        let id = tokenizer.encode("日").unwrap()[1];
        let mut stream = tokenizer.stream(Special::Show);
        let told: String = (0..100).map(|_| stream.push(id).unwrap()).collect();
        assert!(told.chars().count() >= 90, "{told}");
        assert!(stream.ids.len() < 10);
    }

    #[test]
    fn a_tokenizer_that_does_not_fit_is_refused() {
        let error = |dir: &Path, vocab| Tokenizer::open(dir, vocab).unwrap_err().to_string();
        let e = error(Path::new(TINY), 2000);
        assert!(e.contains("but config.json's vocab_size is 2000: the tokenizer is another model's"), "{e}");
        let grown = changed(|t| {
            let added = t["added_tokens"].as_array_mut().unwrap();
            let mut new = added.last().unwrap().clone();
            new["id"] = 2048.into();
            new["content"] = "<|tool_start|>".into();
            added.push(new);
        });
        let grown = Tokenizer::open(grown.path(), 2048).unwrap();
        assert!(grown.remark().unwrap().contains("1 added tokens"));
        assert_eq!(grown.encode("fn").unwrap(), tiny().encode("fn").unwrap());
        let e = grown.encode("fn <|tool_start|>").unwrap_err().to_string();
        assert!(e.contains("<|tool_start|>") && e.contains("resize_token_embeddings"), "{e}");
        let e = error(Path::new("nowhere"), 2048);
        assert!(e.starts_with("nowhere/tokenizer.json: is missing"), "{e}");
        let dir = changed(|v| v["model"]["type"] = "XYZ".into());
        assert!(error(dir.path(), 2048).contains("is no tokenizer that this version reads"));
        let dir = changed(|v| v["model"]["dropout"] = 0.1.into());
        assert!(error(dir.path(), 2048).contains("dropout"));
    }

    #[test]
    fn without_a_token_for_the_end_there_is_no_separator() {
        let dir = changed(|v| v["added_tokens"] = serde_json::json!([]));
        let e = Tokenizer::open(dir.path(), 2048).unwrap().separator().unwrap_err().to_string();
        assert!(e.contains("<|endoftext|>") && e.contains("names no eos_token"), "{e}");
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": {"content": "fn"}}"#).unwrap();
        let tokenizer = Tokenizer::open(dir.path(), 2048).unwrap();
        assert_eq!(Some(tokenizer.separator().unwrap()), tokenizer.id("fn"));
    }
}
