//! Requests to the hub and to whatever it redirects to. The token goes to the hub alone; redirects are counted, a body is cut
//! off where it exceeds what was announced, and nobody is waited for longer than the environment allows.

use std::io::Read;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::Settings;
use super::client::Part;
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// Redirects that are followed for one request.
const REDIRECTS: usize = 10;
/// Largest list of files that is believed.
const MAX_LIST: u64 = 64 << 20;
/// Bytes that are read at a time.
const PIECE: usize = 1 << 16;

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The answer had this status.
    Status(u16),
    /// The network or the server had trouble, which may pass.
    Passing(String),
    /// The answer cannot be.
    Wrong(String),
    /// The disk had trouble.
    Ours(Error),
}

impl Failure {
    /// True for what may go away: a cut connection, a busy server. Not for a refusal.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Status(code) => *code == 429 || *code >= 500,
            Self::Passing(_) => true,
            Self::Wrong(_) | Self::Ours(_) => false,
        }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Ours(e)
    }
}

type Outcome<T> = std::result::Result<T, Failure>;

/// What the hub says of a file.
#[derive(Debug)]
pub(super) struct Meta {
    /// The commit that it is of.
    pub(super) commit: String,
    /// Its hash, as the hub names it.
    pub(super) etag: String,
    /// Bytes.
    pub(super) size: u64,
}

/// A client.
pub(super) struct Http<'a> {
    agent: Agent,
    settings: &'a Settings,
}

impl<'a> Http<'a> {
    pub(super) fn new(settings: &'a Settings) -> Self {
        let config = Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("gptoss/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(settings.patience))
            .timeout_connect(Some(settings.patience))
            .timeout_send_request(Some(settings.patience))
            .timeout_recv_response(Some(settings.patience))
            .build();
        Self { agent: Agent::new_with_config(config), settings }
    }

    /// An object in JSON; what is not wanted of it is passed over.
    pub(super) fn json<T: DeserializeOwned>(&self, url: &str) -> Outcome<T> {
        let answer = self.follow(url, None, |_| {})?;
        let mut text = Vec::new();
        self.read(answer.into_body(), MAX_LIST, |piece| {
            text.extend_from_slice(piece);
            Ok(())
        })?;
        serde_json::from_slice(&text).map_err(|e| Failure::Wrong(format!("{url} gives no such JSON: {e}")))
    }

    /// What the hub says of the file at `url`; the first answers count that have a hash.
    pub(super) fn meta(&self, url: &str) -> Outcome<Meta> {
        let (mut commit, mut etag, mut size) = (None, None, None);
        let mut linked = false;
        let answer = self.follow(url, Some("bytes=0-0"), |answer| {
            let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
            commit = commit.take().or_else(|| header("x-repo-commit"));
            if !linked {
                linked = header("x-linked-etag").is_some();
                etag = header("x-linked-etag").or_else(|| header("etag").filter(|_| etag.is_none())).or(etag.take());
            }
            size = size.or_else(|| header("x-linked-size")?.parse().ok());
        })?;
        let total = || {
            let range = answer.headers().get("content-range")?.to_str().ok()?;
            range.rsplit_once('/')?.1.parse::<u64>().ok()
        };
        let length = || answer.headers().get("content-length")?.to_str().ok()?.parse().ok();
        let whole = || if answer.status() == StatusCode::OK { length() } else { None };
        let missing = |what: &str| Failure::Wrong(format!("{url}: the answer does not say {what}"));
        Ok(Meta {
            commit: commit.ok_or_else(|| missing("of which commit the file is (x-repo-commit)"))?,
            etag: etag
                .map(|e| e.trim_start_matches("W/").replace('"', ""))
                .ok_or_else(|| missing("its hash (etag)"))?,
            size: size.or_else(total).or_else(whole).ok_or_else(|| missing("how long it is"))?,
        })
    }

    /// Downloads what `part` lacks of the `size` bytes at `url`.
    pub(super) fn download(&self, url: &str, part: &mut Part, size: u64, progress: &Progress) -> Outcome<()> {
        let mut have = part.len()?;
        if have > size {
            part.empty()?;
            have = 0;
        }
        if have == size {
            return Ok(());
        }
        let answer = self.follow(url, Some(&format!("bytes={have}-")), |_| {})?;
        if answer.status() != StatusCode::PARTIAL_CONTENT && have > 0 {
            // The server gives the whole file.
            part.empty()?;
            have = 0;
        }
        progress.advance(have);
        self.read(answer.into_body(), size - have, |piece| {
            part.write(piece)?;
            progress.advance(piece.len() as u64);
            have += piece.len() as u64;
            Ok(())
        })?;
        if have < size {
            return Err(Failure::Passing(format!("the connection broke at {have} of {size} bytes")));
        }
        part.sync()?;
        Ok(())
    }

    /// The answer behind all redirects; `each` sees every one on the way.
    fn follow(&self, url: &str, range: Option<&str>, mut each: impl FnMut(&Response<Body>)) -> Outcome<Response<Body>> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(range) = range {
                request = request.header("range", range);
            }
            if let Some(token) =
                self.settings.token.as_ref().filter(|_| origin(&url) == origin(&self.settings.endpoint))
            {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let answer = request.call().map_err(|e| Failure::Passing(e.to_string()))?;
            each(&answer);
            let status = answer.status();
            if status.is_success() {
                return Ok(answer);
            }
            if ![301, 302, 303, 307, 308].contains(&status.as_u16()) {
                return Err(Failure::Status(status.as_u16()));
            }
            let location = answer.headers().get("location").and_then(|l| l.to_str().ok());
            let location = location.ok_or_else(|| Failure::Wrong(format!("{url} redirects to nowhere ({status})")))?;
            url = join(&url, location).map_err(Failure::Wrong)?;
        }
        Err(Failure::Wrong(format!("{REDIRECTS} redirects lead to no end, at last to {url}")))
    }

    /// Gives the pieces of a body of at most `most` bytes to `put`.
    fn read(&self, body: Body, most: u64, mut put: impl FnMut(&[u8]) -> Result<()>) -> Outcome<()> {
        let (sender, receiver) = sync_channel::<std::io::Result<Vec<u8>>>(4);
        let mut reader = body.into_reader();
        // A read cannot be given up; whoever waits for it can.
        let started = std::thread::Builder::new().spawn(move || {
            loop {
                let mut piece = vec![0; PIECE];
                let read = reader.read(&mut piece).map(|n| {
                    piece.truncate(n);
                    piece
                });
                let end = read.as_ref().map_or(true, Vec::is_empty);
                if sender.send(read).is_err() || end {
                    return;
                }
            }
        });
        started.map_err(|e| Failure::Wrong(Error::Thread(e).to_string()))?;
        let mut got = 0;
        loop {
            match receiver.recv_timeout(self.settings.patience) {
                Ok(Ok(piece)) if piece.is_empty() => return Ok(()),
                Ok(Ok(piece)) => {
                    got += piece.len() as u64;
                    if got > most {
                        return Err(Failure::Wrong(format!("more arrives than the {most} bytes that were announced")));
                    }
                    put(&piece)?;
                }
                Ok(Err(e)) => return Err(Failure::Passing(e.to_string())),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Passing("the connection broke".into())),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.settings.patience.as_secs_f64();
                    return Err(Failure::Passing(format!("nothing arrived for {seconds} s")));
                }
            }
        }
    }
}

/// How long nobody is waited for longer, where the environment does not say.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Where a redirect from `base` leads.
fn join(base: &str, location: &str) -> std::result::Result<String, String> {
    let scheme = base.split_once("://").map_or("https", |(s, _)| s);
    let url = if location.starts_with("http://") || location.starts_with("https://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{}{location}", origin(base))
    } else {
        return Err(format!("{base} redirects to {location:?}, which is no address"));
    };
    if base.starts_with("https://") && !url.starts_with("https://") {
        return Err(format!("{base} redirects to {url}, which is not encrypted"));
    }
    Ok(url)
}

/// A path as it stands in a URL.
pub(super) fn encoded(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved_and_origins_told_apart() {
        let to = |l: &str| join("https://hub.example/a/b?c", l).unwrap_or_else(|e| e);
        assert_eq!(to("/x"), "https://hub.example/x");
        assert_eq!(to("//cdn.example/x"), "https://cdn.example/x");
        assert_eq!(to("https://cdn.example/x"), "https://cdn.example/x");
        assert!(to("http://hub.example/x").contains("not encrypted"));
        assert!(to("x").contains("no address"));
        assert_eq!(origin("https://hub.example:8443/a"), "https://hub.example:8443");
        assert_ne!(origin("https://hub.example.evil.example/"), origin("https://hub.example/"));
        assert_ne!(origin("http://hub.example/"), origin("https://hub.example"));
        assert_eq!(encoded("refs/a b%"), "refs/a%20b%25");
    }
}
