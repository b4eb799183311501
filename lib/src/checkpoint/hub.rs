//! A hub id -> a local folder, through hf-hub and the cache that Python's huggingface_hub shares.
//!
//! Honoured: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Every file is of one commit, and its size and hash
//! (SHA-256 of large files, git's SHA-1 of small ones) are checked before it is used.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::digest::hex;
use super::source::is_side_file;
use super::{CONFIG, INDEX};
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// Tries in a row that bring no new byte.
const TRIES: u32 = 4;

/// A checkpoint that was asked for by path or by hub id.
#[derive(Debug, Clone)]
pub struct Located {
    /// The folder with its files.
    pub dir: PathBuf,
    /// `org/name@commit` where it came from the hub.
    pub hub: Option<String>,
}

/// What of a checkpoint is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All of it.
    Everything,
    /// `config.json`: enough for a plan.
    ConfigOnly,
}

/// A repository on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl HubId {
    /// Parses `org/name[@revision]`; `None` where `text` cannot be a hub id.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = repo.split_once('/')?;
        let word = |s: &str| {
            !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let revision_ok = !revision.is_empty()
            && !revision.contains("..")
            && revision.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
            && !revision.starts_with('/');
        (word(org) && word(name) && revision_ok).then(|| Self { repo: repo.into(), revision: revision.into() })
    }
}

/// What the environment says about the hub.
struct Settings {
    cache: PathBuf,
    token: Option<String>,
    endpoint: String,
    offline: bool,
}

impl Settings {
    fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let home = match (var("HF_HOME"), var("XDG_CACHE_HOME"), var("HOME")) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(cache), _) => Path::new(&cache).join("huggingface"),
            (None, None, Some(home)) => Path::new(&home).join(".cache/huggingface"),
            (None, None, None) => {
                return Err(Error::Refused("neither HF_HOME nor HOME is set: there is no place for downloads".into()));
            }
        };
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let stored =
            || std::fs::read_to_string(var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from)).ok();
        let token = var("HF_TOKEN").or_else(stored).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline =
            var("HF_HUB_OFFLINE").is_some_and(|v| !["0", "false", "no", "off"].contains(&v.to_lowercase().as_str()));
        Ok(Self { cache, token, endpoint: endpoint.trim_end_matches('/').into(), offline })
    }
}

/// A folder as it is, or a hub id's files, downloaded where they are not in the cache.
pub fn locate(text: &str, wanted: Wanted, progress: &Progress) -> Result<Located> {
    let path = Path::new(text);
    match HubId::parse(text) {
        Some(id) if !path.exists() => match fetch(&id, &Settings::from_env()?, wanted, progress) {
            Err(Error::Hub { repo, reason }) => Err(Error::Hub {
                repo,
                reason: format!("{reason} (there is no folder {text} here, so it was taken for a hub id)"),
            }),
            other => other,
        },
        _ => Ok(Located { dir: path.to_path_buf(), hub: None }),
    }
}

fn fetch(id: &HubId, settings: &Settings, needed: Wanted, progress: &Progress) -> Result<Located> {
    let cache = Cache::new(settings.cache.clone());
    if settings.offline {
        return cached(id, &cache);
    }
    let hub = Hub { id, settings };
    let api = ApiBuilder::from_cache(cache.clone())
        .with_token(settings.token.clone())
        .with_endpoint(settings.endpoint.clone())
        // Its own retry appends to the wrong place after a cut at zero bytes; `download` below tries again instead.
        .with_retries(0)
        .with_progress(false)
        .with_user_agent("gptoss", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(|e| hub.explain(e, "the repository"))?;
    let named = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone());
    let info = hub.patiently(|| api.repo(named.clone()).info()).map_err(|e| hub.explain(e, "the repository"))?;
    if !is_hash(&info.sha, &[40, 64]) {
        return Err(hub.error(format!("the hub calls its commit {:?}, which is no hash", info.sha)));
    }
    let repo = Repo::with_revision(id.repo.clone(), RepoType::Model, info.sha.clone());
    let mut wanted: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).filter(|n| is_wanted(n)).collect();
    wanted.sort_unstable();
    if !wanted.contains(&CONFIG) || !wanted.iter().any(|n| n.ends_with(".safetensors")) {
        return Err(hub.error("has no config.json with *.safetensors beside it, so it is no checkpoint"));
    }
    if needed == Wanted::ConfigOnly {
        wanted.retain(|&n| n == CONFIG);
    }
    progress.note(&format!("{}: {} files of commit {}", id.repo, wanted.len(), info.sha));
    for name in wanted {
        hub.download(&api, &api.repo(repo.clone()), &cache.repo(repo.clone()), &info.sha, name, progress)?;
    }
    // Beside the commit, remember the name, so that the next run finds it offline.
    cache.repo(named).create_ref(&info.sha).map_err(Error::io("write a reference in", &settings.cache))?;
    let dir = cache.repo(repo).pointer_path(&info.sha);
    Ok(Located { dir, hub: Some(format!("{}@{}", id.repo, info.sha)) })
}

/// Files that make a checkpoint: not the original weights in sub-folders, not pictures.
fn is_wanted(name: &str) -> bool {
    let plain = !name.contains(['/', '\\']) && !name.starts_with('.');
    plain
        && (name == CONFIG
            || name == INDEX
            || (name.starts_with("model") && name.ends_with(".safetensors"))
            || is_side_file(name))
}

fn is_hash(text: &str, lengths: &[usize]) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The snapshot that the cache has for `id`.
fn cached(id: &HubId, cache: &Cache) -> Result<Located> {
    let repo = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone());
    let folder = cache.path().join(repo.folder_name());
    let named = std::fs::read_to_string(folder.join("refs").join(&id.revision)).ok();
    let commit = named.map_or_else(|| id.revision.clone(), |c| c.trim().to_owned());
    let dir = folder.join("snapshots").join(&commit);
    if commit.contains("..") || !dir.is_dir() {
        return Err(Error::Hub {
            repo: format!("{}@{}", id.repo, id.revision),
            reason: format!(
                "HF_HUB_OFFLINE is set, and the cache {} does not have it; run once without",
                cache.path().display()
            ),
        });
    }
    Ok(Located { dir, hub: Some(format!("{}@{commit}", id.repo)) })
}

struct Hub<'a> {
    id: &'a HubId,
    settings: &'a Settings,
}

/// Passes hf-hub's progress on.
struct Watch<'a> {
    progress: &'a Progress,
}

impl hf_hub::api::Progress for Watch<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.progress.start(filename, size as u64);
    }
    fn update(&mut self, size: usize) {
        self.progress.advance(size as u64);
    }
    fn finish(&mut self) {
        self.progress.finish();
    }
}

impl Hub<'_> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Hub { repo: format!("{}@{}", self.id.repo, self.id.revision), reason: reason.into() }
    }

    /// What an error of the client means for the user.
    fn explain(&self, error: ApiError, what: &str) -> Error {
        let endpoint = &self.settings.endpoint;
        let token = if self.settings.token.is_some() {
            "the token that was sent does not open it"
        } else {
            "no token was sent; set HF_TOKEN"
        };
        self.error(match status(&error) {
            Some(code @ (401 | 403)) => {
                format!("the hub refuses {what} with status {code}: it is private or gated, or does not exist; {token}")
            }
            Some(404) => {
                format!("the hub does not have {what} (status 404): check the spelling of repository and revision")
            }
            Some(code) => format!("the hub answers {code} for {what}; try again later"),
            None => match error {
                ApiError::LockAcquisition(path) => format!("another program is downloading {}", path.display()),
                other => {
                    format!("cannot get {what} from {endpoint}: {other}; a cached model loads with HF_HUB_OFFLINE=1")
                }
            },
        })
    }

    /// Tries again while the failure looks like the network's.
    fn patiently<T>(
        &self,
        mut f: impl FnMut() -> std::result::Result<T, ApiError>,
    ) -> std::result::Result<T, ApiError> {
        let mut tries = 0;
        loop {
            match f() {
                Err(e) if is_passing(&e) && tries + 1 < TRIES => tries += 1,
                other => return other,
            }
            std::thread::sleep(Duration::from_millis(200 << tries));
        }
    }

    fn download(
        &self,
        api: &Api,
        repo: &ApiRepo,
        cache: &hf_hub::CacheRepo,
        commit: &str,
        name: &str,
        progress: &Progress,
    ) -> Result<()> {
        let meta = self.patiently(|| api.metadata(&repo.url(name))).map_err(|e| self.explain(e, name))?;
        if meta.commit_hash() != commit {
            return Err(self.error(format!("the hub gives {name} of commit {}, wanted {commit}", meta.commit_hash())));
        }
        if !is_hash(meta.etag(), &[40, 64]) {
            return Err(self.error(format!("the hub names {name} by {:?}, which is no hash", meta.etag())));
        }
        let (size, blob, pointer) =
            (meta.size() as u64, cache.blob_path(meta.etag()), cache.pointer_path(commit).join(name));
        let length = |p: &Path| std::fs::metadata(p).map(|m| m.len()).ok();
        if length(&pointer) == Some(size) && length(&blob) == Some(size) {
            return Ok(());
        }
        let part = blob.with_extension("part");
        let (mut tries, mut damaged) = (0, false);
        loop {
            // A dangling or wrong pointer, and a part that is longer than the file or exactly as long, would trip hf-hub.
            remove(&pointer)?;
            let before = length(&part).unwrap_or(0);
            if before >= size && before > 0 {
                remove(&part)?;
            }
            match repo.download_with_progress(name, Watch { progress }) {
                Ok(_) => match self.verify(&blob, size, meta.etag()) {
                    Ok(()) => return Ok(()),
                    Err(reason) => {
                        remove(&pointer)?;
                        remove(&blob)?;
                        if std::mem::replace(&mut damaged, true) {
                            return Err(self.error(format!("{name} arrived damaged twice: {reason}")));
                        }
                        progress.note(&format!("{name} arrived damaged ({reason}); once more from the start"));
                    }
                },
                Err(e) if is_passing(&e) => {
                    let now = length(&part).unwrap_or(0);
                    tries = if now > before { 0 } else { tries + 1 };
                    if tries >= TRIES {
                        return Err(self.explain(e, name));
                    }
                    progress.note(&format!("{name}: the connection broke at {now} of {size} bytes; resuming"));
                    std::thread::sleep(Duration::from_millis(200 << tries));
                }
                Err(e) => return Err(self.explain(e, name)),
            }
        }
    }

    /// Size, and the hash by which the hub names the file: SHA-256 (64 digits), or git's blob SHA-1 (40).
    fn verify(&self, blob: &Path, size: u64, etag: &str) -> std::result::Result<(), String> {
        let open = || std::fs::File::open(blob).map_err(|e| e.to_string());
        let have = open()?.metadata().map_err(|e| e.to_string())?.len();
        if have != size {
            return Err(format!("it has {have} bytes, wanted {size}"));
        }
        let digest = if etag.len() == 64 {
            hash_file::<Sha256>(open()?, &[])
        } else {
            hash_file::<Sha1>(open()?, format!("blob {size}\0").as_bytes())
        }
        .map_err(|e| e.to_string())?;
        if digest.eq_ignore_ascii_case(etag) { Ok(()) } else { Err(format!("its hash is {digest}, wanted {etag}")) }
    }
}

fn hash_file<D: Digest>(mut file: std::fs::File, prefix: &[u8]) -> std::io::Result<String> {
    let mut hasher = D::new();
    hasher.update(prefix);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(e) => match **e {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

/// True for what may go away: a cut connection, a busy server. Not for a refusal.
fn is_passing(error: &ApiError) -> bool {
    match (status(error), error) {
        (Some(code), _) => code == 429 || code >= 500,
        (None, ApiError::RequestError(_) | ApiError::IoError(_)) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        let id = |s: &str| HubId::parse(s).map(|i| (i.repo, i.revision));
        assert_eq!(id("openai/gpt-oss-20b"), Some(("openai/gpt-oss-20b".into(), "main".into())));
        assert_eq!(id("a/b@refs/pr/1"), Some(("a/b".into(), "refs/pr/1".into())));
        for path in ["./a", "/a/b", "a", "a/b/c", "../x", "a/b@", "a/b@../x", "a b/c", "a/.b"] {
            assert_eq!(id(path), None, "{path}");
        }
    }

    #[test]
    fn only_the_checkpoint_is_wanted() {
        for name in [
            "config.json",
            INDEX,
            "model-00000-of-00002.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "LICENSE",
        ] {
            assert!(is_wanted(name), "{name}");
        }
        for name in ["original/model.safetensors", "metal/model.bin", "README.md", "../config.json", ".gitattributes"] {
            assert!(!is_wanted(name), "{name}");
        }
    }
}
