//! One repository on the hub: its file list at one commit, and downloads that are checked.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::HubId;
use crate::checkpoint::digest::hex;
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// Tries in a row that bring no new byte.
const TRIES: u32 = 4;

/// What the environment says about the hub.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where downloads lie: HF_HUB_CACHE, else `hub` in HF_HOME.
    pub cache: PathBuf,
    /// HF_TOKEN, else what HF_TOKEN_PATH or the file `token` in HF_HOME holds.
    pub token: Option<String>,
    /// HF_ENDPOINT, else the public hub.
    pub endpoint: String,
    /// HF_HUB_OFFLINE: only the cache is asked.
    pub offline: bool,
}

impl Settings {
    /// Reads the environment.
    pub fn from_env() -> Result<Self> {
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

fn is_hash(text: &str, lengths: &[usize]) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A repository as it is asked for.
pub(super) struct Hub<'a> {
    pub(super) id: &'a HubId,
    pub(super) kind: RepoType,
    pub(super) settings: &'a Settings,
}

/// A repository at one commit.
pub(super) struct Listing {
    api: Api,
    pub(super) commit: String,
    /// Its files, as the hub names them: not to be trusted as paths.
    pub(super) names: Vec<String>,
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
    /// The files of the revision, and the commit that it is.
    pub(super) fn list(&self) -> Result<Listing> {
        let settings = self.settings;
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_token(settings.token.clone())
            .with_endpoint(settings.endpoint.clone())
            // Its own retry appends to the wrong place after a cut at zero bytes; `download` below tries again instead.
            .with_retries(0)
            .with_progress(false)
            .with_user_agent("gptoss", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| self.explain(e, "the repository"))?;
        let named = self.repo(&self.id.revision);
        let info = self.patiently(|| api.repo(named.clone()).info()).map_err(|e| self.explain(e, "the repository"))?;
        if !is_hash(&info.sha, &[40, 64]) {
            return Err(self.error(format!("the hub calls its commit {:?}, which is no hash", info.sha)));
        }
        let names = info.siblings.into_iter().map(|s| s.rfilename).collect();
        Ok(Listing { api, commit: info.sha, names })
    }

    /// Downloads `names`, which must be safe as paths, and gives the folder in which they lie.
    pub(super) fn get(&self, listing: &Listing, names: &[&str], progress: &Progress) -> Result<PathBuf> {
        let Listing { api, commit, .. } = listing;
        let cache = Cache::new(self.settings.cache.clone());
        let repo = self.repo(commit);
        progress.note(&format!("{}: {} files of commit {commit}", self.id.repo, names.len()));
        for name in names {
            self.download(api, &api.repo(repo.clone()), &cache.repo(repo.clone()), commit, name, progress)?;
        }
        // Beside the commit, remember the name, so that the next run finds it offline.
        let named = cache.repo(self.repo(&self.id.revision));
        named.create_ref(commit).map_err(Error::io("write a reference in", &self.settings.cache))?;
        Ok(cache.repo(repo).pointer_path(commit))
    }

    /// The snapshot that the cache has, and its commit.
    pub(super) fn cached(&self) -> Result<(PathBuf, String)> {
        let (revision, cache) = (&self.id.revision, &self.settings.cache);
        let folder = cache.join(self.repo(revision).folder_name());
        let named = std::fs::read_to_string(folder.join("refs").join(revision)).ok();
        let commit = named.map_or_else(|| revision.clone(), |c| c.trim().to_owned());
        let dir = folder.join("snapshots").join(&commit);
        if commit.contains("..") || !dir.is_dir() {
            return Err(self.not_cached("it"));
        }
        Ok((dir, commit))
    }

    /// The cache lacks something, and nobody else may be asked.
    pub(super) fn not_cached(&self, what: &str) -> Error {
        let cache = self.settings.cache.display();
        self.error(format!("HF_HUB_OFFLINE is set, and the cache {cache} does not have {what}; run once without"))
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.repo.clone(), self.kind, revision.to_owned())
    }

    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
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
                    format!("cannot get {what} from {endpoint}: {other}; a cached copy loads with HF_HUB_OFFLINE=1")
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
