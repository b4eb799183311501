//! A server on loopback that answers like the hub: file lists, redirects of large files to a store, ranges, tokens. It can
//! cut connections and damage bytes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that `main` points to.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does wrong, and when.
#[derive(Default, Clone)]
pub struct Faults {
    /// Bodies of the store are cut after so many bytes, one entry a request, then no more.
    pub cuts: Vec<usize>,
    /// So many of the store's bodies have their last byte changed.
    pub damaged: usize,
    /// Requests need this token.
    pub token: Option<String>,
    /// The commit that the file list names.
    pub commit: Option<String>,
    /// Every file is named by this instead of its hash.
    pub etag: Option<String>,
    /// More names in the file list.
    pub extra: Vec<String>,
    /// How it answers for large files.
    pub lie: Option<Lie>,
}

/// Answers that a hub does not give.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// 304 for what nobody has.
    NotModified,
    /// A redirect without an address.
    Nowhere,
    /// Relative redirects, each to the next.
    Circle,
    /// It begins and never goes on.
    Stall,
    /// Zeros without end.
    Endless,
    /// More bytes than it announces.
    Inflated,
}

struct State {
    /// `org/model`, or `datasets/org/name`.
    repo: String,
    files: BTreeMap<String, Vec<u8>>,
    faults: Faults,
    /// Path and range of every request.
    log: Vec<(String, Option<String>)>,
    /// Tokens that came with them.
    tokens: Vec<Option<String>>,
    address: String,
    /// Who has the content of large files.
    store: String,
}

/// A running server; it ends with the test.
pub struct Hub {
    state: Arc<Mutex<State>>,
    /// For HF_ENDPOINT.
    pub endpoint: String,
}

impl Hub {
    /// Serves the files of `dir` as the repository `org/model`.
    pub fn serve(dir: &Path, faults: Faults) -> Self {
        Self::serve_files("org/model", super::files(dir), faults)
    }

    /// Serves files, by their paths in it, as the repository `repo`: `org/model`, or `datasets/org/name`.
    pub fn serve_files(repo: &str, files: BTreeMap<String, Vec<u8>>, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let address = listener.local_addr().expect("bound").to_string();
        let endpoint = format!("http://{address}");
        let state = State {
            repo: repo.to_owned(),
            files,
            faults,
            log: Vec::new(),
            tokens: Vec::new(),
            store: address.clone(),
            address,
        };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || answer(stream, &shared));
            }
        });
        Self { state, endpoint }
    }

    /// Large files are redirected to the store of `other`, another host.
    pub fn store_at(&self, other: &Self) {
        let there = other.state.lock().expect("the server does not panic").address.clone();
        self.state.lock().expect("the server does not panic").store = there;
    }

    /// Tokens that came with requests so far.
    pub fn tokens(&self) -> Vec<String> {
        let state = self.state.lock().expect("the server does not panic");
        state.tokens.iter().flatten().cloned().collect()
    }

    /// Path and range of every request so far.
    pub fn log(&self) -> Vec<(String, Option<String>)> {
        self.state.lock().expect("the server does not panic").log.clone()
    }
}

struct Request {
    path: String,
    range: Option<String>,
    token: Option<String>,
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    Some(Request { path, range, token })
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let Some(request) = read(&stream) else { return };
    let reply = {
        let mut state = state.lock().expect("no handler panics");
        state.log.push((request.path.clone(), request.range.clone()));
        state.tokens.push(request.token.clone());
        let lie = state.faults.lie.filter(|_| request.path.contains(".safetensors"));
        (lie, reply(&request, &mut state))
    };
    let (lie, reply) = reply;
    let content = request.range.as_deref().is_some_and(|r| r != "bytes=0-0");
    match lie {
        Some(Lie::NotModified) => drop(stream.write_all(&head("304 Not Modified", &[], 0))),
        Some(Lie::Nowhere) => drop(stream.write_all(&head("302 Found", &[], 0))),
        Some(Lie::Circle) => {
            let next = format!("{}a", request.path);
            drop(stream.write_all(&head("302 Found", &[("location", next)], 0)));
        }
        Some(Lie::Stall) if content && request.path.starts_with("/store/") => {
            let begin = reply.windows(4).position(|w| w == b"\r\n\r\n").expect("a reply has a head") + 4;
            let _ = stream.write_all(&reply[..begin]);
            std::thread::sleep(std::time::Duration::from_secs(20));
        }
        Some(Lie::Endless | Lie::Inflated) if content && request.path.starts_with("/store/") => {
            let begin = b"HTTP/1.1 206 Partial Content\r\nconnection: close\r\ncontent-range: bytes 0-9/10\r\n\r\n";
            let _ = stream.write_all(begin);
            let mut left = if lie == Some(Lie::Endless) { u64::MAX } else { 16 << 20 };
            let zeros = vec![0; 1 << 16];
            while left > 0 && stream.write_all(&zeros).is_ok() {
                left = left.saturating_sub(zeros.len() as u64);
            }
        }
        _ => drop(stream.write_all(&reply)),
    }
}

fn head(status: &str, headers: &[(&str, String)], length: usize) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n");
    headers.iter().for_each(|(n, v)| text += &format!("{n}: {v}\r\n"));
    (text + "\r\n").into_bytes()
}

fn reply(request: &Request, state: &mut State) -> Vec<u8> {
    let commit = state.faults.commit.clone().unwrap_or_else(|| COMMIT.into());
    let store = request.path.strip_prefix("/store/").map(str::to_owned);
    if store.is_none() && state.faults.token.is_some() && request.token != state.faults.token {
        return head("401 Unauthorized", &[], 0);
    }
    let api = match state.repo.starts_with("datasets/") {
        true => format!("/api/{}/revision/", state.repo),
        false => format!("/api/models/{}/revision/", state.repo),
    };
    if let Some(rest) = request.path.strip_prefix(&api) {
        if !["main", "v2", COMMIT].contains(&rest) {
            return head("404 Not Found", &[], 0);
        }
        let names = state.files.keys().chain(&state.faults.extra);
        let siblings: Vec<_> = names.map(|n| serde_json::json!({"rfilename": n})).collect();
        let body = serde_json::json!({"sha": commit, "siblings": siblings}).to_string();
        return [head("200 OK", &[("content-type", "application/json".into())], body.len()), body.into_bytes()]
            .concat();
    }
    if let Some(name) = store {
        let body = state.files[&name].clone();
        return body_of(request, &body, &[], Some(&mut state.faults));
    }
    let resolve = format!("/{}/resolve/", state.repo);
    let Some((_, name)) = request.path.strip_prefix(&resolve).and_then(|p| p.split_once('/')) else {
        return head("404 Not Found", &[], 0);
    };
    let Some(body) = state.files.get(name) else { return head("404 Not Found", &[], 0) };
    let large = [".safetensors", ".parquet", ".gz"].iter().any(|end| name.ends_with(end));
    let hash = if large { hex(&Sha256::digest(body)) } else { hex(&git_blob(body)) };
    let etag = format!("\"{}\"", state.faults.etag.clone().unwrap_or(hash));
    if large {
        let headers = [
            ("x-repo-commit", commit),
            ("x-linked-etag", etag),
            ("x-linked-size", body.len().to_string()),
            ("location", format!("http://{}/store/{name}", state.store)),
        ];
        return head("302 Found", &headers, 0);
    }
    body_of(request, body, &[("x-repo-commit", commit), ("etag", etag)], None)
}

/// The bytes that were asked for; `faults` where they come from the store.
fn body_of(request: &Request, body: &[u8], headers: &[(&str, String)], faults: Option<&mut Faults>) -> Vec<u8> {
    let range = request.range.as_deref().and_then(|r| r.strip_prefix("bytes=")).unwrap_or("0-");
    let (start, end) = range.split_once('-').expect("a range");
    let start: usize = start.parse().expect("a number");
    if start >= body.len() {
        return head("416 Range Not Satisfiable", &[], 0);
    }
    let end = end.parse::<usize>().map_or(body.len(), |e| (e + 1).min(body.len()));
    let mut part = body[start..end].to_vec();
    let mut headers = headers.to_vec();
    headers.push(("content-range", format!("bytes {start}-{}/{}", end - 1, body.len())));
    let mut reply = head("206 Partial Content", &headers, part.len());
    // A request for one byte asks for the size; faults are for the content.
    if let Some(faults) = faults.filter(|_| part.len() > 1) {
        if faults.damaged > 0 {
            faults.damaged -= 1;
            *part.last_mut().expect("not empty") ^= 1;
        }
        if !faults.cuts.is_empty() {
            part.truncate(faults.cuts.remove(0));
        }
    }
    reply.extend_from_slice(&part);
    reply
}

fn git_blob(body: &[u8]) -> [u8; 20] {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", body.len()));
    hash.update(body);
    hash.finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
