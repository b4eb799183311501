//! Hub ids, against a loopback server that behaves like the hub and, where asked to, misbehaves.

#[path = "support/hub.rs"]
mod server;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use server::{COMMIT, Faults, Hub, Lie};
use support::{Ran, assert_same, command, files, run, tiny};

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn dequant(&self, hub: &Hub, id: &str, dst: &str) -> Command {
        let mut c = command("gptoss-dequant");
        c.args(["--src", id, "--dst"])
            .arg(self.path(dst))
            .env("HF_ENDPOINT", &hub.endpoint)
            .env("HF_HOME", self.path("home"))
            .env("XDG_CACHE_HOME", self.path("own"));
        c
    }

    /// What the same files give from a folder.
    fn expected(&self) -> PathBuf {
        let dst = self.path("expected");
        run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&dst)).manifest();
        dst
    }
}

fn refused(ran: Ran, want: &str, dst: &Path) {
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(ran.err.contains(want), "wanted {want:?}: {}", ran.err);
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
    assert!(!dst.exists());
}

/// Ranges that were asked of the store, but for those that only ask the size.
fn ranges(hub: &Hub, name: &str) -> Vec<String> {
    let wanted = format!("/store/{name}");
    let asked = hub.log().into_iter().filter(|(p, _)| *p == wanted).filter_map(|(_, r)| r);
    asked.filter(|r| r != "bytes=0-0").collect()
}

const SHARD: &str = "model-00000-of-00001.safetensors";

#[test]
fn a_hub_id_is_downloaded_once_and_then_found_offline() {
    let place = Place::new();
    let faults = Faults {
        extra: vec!["original/model.safetensors".into(), "README.md".into(), "../evil.json".into()],
        ..Default::default()
    };
    let hub = Hub::serve(&tiny(), faults);
    let manifest = run(&mut place.dequant(&hub, "org/model", "a")).manifest();
    assert_eq!(manifest["volatile"]["source_hub"], format!("org/model@{COMMIT}"));
    assert_same(&place.path("a"), &place.expected());
    assert!(
        hub.log().iter().all(|(p, _)| !p.contains("original") && !p.contains("README") && !p.contains("evil")),
        "{:?}",
        hub.log()
    );

    let before = ranges(&hub, SHARD).len();
    run(&mut place.dequant(&hub, "org/model", "b")).manifest();
    assert_eq!(ranges(&hub, SHARD).len(), before, "the cache was used");

    let asked = hub.log().len();
    run(place.dequant(&hub, "org/model", "c").env("HF_HUB_OFFLINE", "1")).manifest();
    run(place.dequant(&hub, &format!("org/model@{COMMIT}"), "d").env("HF_HUB_OFFLINE", "1")).manifest();
    assert_eq!(hub.log().len(), asked, "nothing was asked");
    assert_same(&place.path("a"), &place.path("d"));
}

#[test]
fn a_cut_connection_resumes_where_it_broke_even_after_no_byte_at_all() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults { cuts: vec![100_000, 0, 1, 2_000_000], ..Default::default() });
    let ran = run(&mut place.dequant(&hub, "org/model", "a"));
    ran.manifest();
    assert_eq!(ranges(&hub, SHARD), ["bytes=0-", "bytes=100000-", "bytes=100000-", "bytes=100001-", "bytes=2100001-"]);
    assert!(ran.err.contains("the connection broke at 100000 of 5138744 bytes; resuming"), "{}", ran.err);
    assert_same(&place.path("a"), &place.expected());
}

#[test]
fn a_connection_that_never_gets_further_gives_up_and_a_later_run_resumes() {
    let place = Place::new();
    let cuts = vec![50_000, 0, 0, 0, 0];
    let hub = Hub::serve(&tiny(), Faults { cuts, ..Default::default() });
    refused(
        run(&mut place.dequant(&hub, "org/model", "a")),
        "cannot get model-00000-of-00001.safetensors",
        &place.path("a"),
    );
    run(&mut place.dequant(&hub, "org/model", "a")).manifest();
    assert_eq!(ranges(&hub, SHARD).last().unwrap(), "bytes=50000-");
    assert_same(&place.path("a"), &place.expected());
}

#[test]
fn damaged_bytes_are_noticed_and_fetched_again() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults { damaged: 1, ..Default::default() });
    let ran = run(&mut place.dequant(&hub, "org/model", "a"));
    ran.manifest();
    assert!(ran.err.contains("arrived damaged") && ran.err.contains("once more from the start"), "{}", ran.err);
    assert_same(&place.path("a"), &place.expected());

    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults { damaged: 99, ..Default::default() });
    refused(run(&mut place.dequant(&hub, "org/model", "a")), "arrived damaged twice: its hash is", &place.path("a"));
    let snapshots = place.path("home").join("hub/models--org--model/snapshots").join(COMMIT);
    assert!(!files(&snapshots).contains_key(SHARD), "nothing damaged stays in the cache");
}

#[test]
fn leftovers_of_other_downloads_do_no_harm() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults::default());
    let blobs = place.path("home").join("hub/models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let hash = |name: &str| gptoss::checkpoint::digest::sha256(&files(&tiny())[name]);
    // One as long as the whole file, one longer: both are not the file.
    std::fs::write(blobs.join(hash(SHARD) + ".part"), vec![0; 5_138_744]).unwrap();
    std::fs::write(blobs.join(hash("model-00001-of-00001.safetensors") + ".part"), vec![0; 9_000_000]).unwrap();
    run(&mut place.dequant(&hub, "org/model", "a")).manifest();
    assert_same(&place.path("a"), &place.expected());
}

#[test]
fn a_refusal_says_what_to_do_about_the_token() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults { token: Some("secret".into()), ..Default::default() });
    let ran = run(&mut place.dequant(&hub, "org/model", "a"));
    insta::assert_snapshot!("no-token", ran.err);
    refused(ran, "status 401", &place.path("a"));
    let ran = run(place.dequant(&hub, "org/model", "a").env("HF_TOKEN", "wrong"));
    refused(ran, "the token that was sent does not open it", &place.path("a"));
    run(place.dequant(&hub, "org/model", "a").env("HF_TOKEN", "secret")).manifest();
    // The other place where a token may be.
    std::fs::write(place.path("home").join("token"), "secret\n").unwrap();
    run(&mut place.dequant(&hub, "org/model@v2", "b")).manifest();
    assert_same(&place.path("a"), &place.path("b"));
}

#[test]
fn what_is_not_there_is_said_by_name() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults::default());
    refused(
        run(&mut place.dequant(&hub, "org/other", "a")),
        "org/other@main: the hub does not have the repository",
        &place.path("a"),
    );
    refused(run(&mut place.dequant(&hub, "org/model@v3", "a")), "org/model@v3", &place.path("a"));
    let offline = run(place.dequant(&hub, "org/other", "a").env("HF_HUB_OFFLINE", "1"));
    refused(offline, "HF_HUB_OFFLINE is set, and the cache", &place.path("a"));
    let nobody = run(place.dequant(&hub, "org/model", "a").env("HF_ENDPOINT", "http://127.0.0.1:9"));
    refused(nobody, "a cached copy loads with HF_HUB_OFFLINE=1", &place.path("a"));
}

#[test]
fn a_hub_that_lies_about_names_gets_nowhere() {
    let place = Place::new();
    for faults in [
        Faults { commit: Some("../../../../escape".into()), ..Default::default() },
        Faults { etag: Some("../../../../escape".into()), ..Default::default() },
    ] {
        let hub = Hub::serve(&tiny(), faults);
        refused(run(&mut place.dequant(&hub, "org/model", "a")), "which is no hash", &place.path("a"));
    }
    assert!(!place.path("escape").exists());
}

#[test]
fn a_dry_run_asks_for_the_config_alone() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults::default());
    let mut quant = command("gptoss-quant --dry-run --quiet --algo rtn --model-in org/model");
    let plan = run(quant.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", place.path("home"))).manifest();
    assert_eq!(plan["plan"]["weights_read"], false);
    assert!(hub.log().iter().all(|(p, _)| p.starts_with("/api/") || p.ends_with("/config.json")), "{:?}", hub.log());
}

/// The token is for the hub: a store on another host does not get it.
#[test]
fn a_token_goes_to_the_hub_alone() {
    let place = Place::new();
    let secret = Faults { token: Some("hf_secret".into()), ..Faults::default() };
    let (hub, store) = (Hub::serve(&tiny(), secret), Hub::serve(&tiny(), Faults::default()));
    hub.store_at(&store);
    run(place.dequant(&hub, "org/model", "a").env("HF_TOKEN", "hf_secret")).manifest();
    assert_same(&place.path("a"), &place.expected());
    assert!(store.log().iter().any(|(p, _)| p.contains(SHARD)), "the store was asked");
    assert_eq!(store.tokens(), Vec::<String>::new());
    assert!(hub.tokens().len() >= 4);
}

#[test]
fn answers_that_cannot_be_end_soon_and_fill_no_disk() {
    for (lie, want) in [
        (Lie::NotModified, "the hub answers 304"),
        (Lie::Nowhere, "redirects to nowhere"),
        (Lie::Circle, "redirects lead to no end"),
        (Lie::Stall, "nothing arrived for 0.3 s"),
        (Lie::Endless, "more arrives than the 5138744 bytes that were announced"),
        (Lie::Inflated, "more arrives than the 5138744 bytes that were announced"),
    ] {
        let place = Place::new();
        let hub = Hub::serve(&tiny(), Faults { lie: Some(lie), ..Faults::default() });
        // Only where nothing comes is a short patience what is tested.
        let patience = if lie == Lie::Stall { "0.3" } else { "60" };
        let ran = run(place.dequant(&hub, "org/model", "a").env("HF_HUB_DOWNLOAD_TIMEOUT", patience));
        refused(ran, want, &place.path("a"));
        let blobs = place.path("home/hub/models--org--model/blobs");
        let bytes: usize = files(&blobs).values().map(Vec::len).sum();
        assert!(bytes < 12 << 20, "{lie:?}: {bytes} bytes on the disk");
    }
}

/// The right size and wrong bytes: fetched again where the hub can be asked, an error where it cannot.
#[test]
fn a_damaged_file_in_the_cache_is_known() {
    let place = Place::new();
    let hub = Hub::serve(&tiny(), Faults::default());
    run(&mut place.dequant(&hub, "org/model", "a")).manifest();
    let pointer = place.path(&format!("home/hub/models--org--model/snapshots/{COMMIT}/{SHARD}"));
    let damage = || {
        let blob = pointer.canonicalize().unwrap();
        let mut bytes = std::fs::read(&blob).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&blob, bytes).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        std::fs::File::open(&blob).unwrap().set_modified(later).unwrap();
    };
    damage();
    let offline = run(place.dequant(&hub, "org/model", "b").env("HF_HUB_OFFLINE", "1"));
    refused(offline, "in the cache is damaged", &place.path("b"));
    let again = run(&mut place.dequant(&hub, "org/model", "c"));
    again.manifest();
    assert!(again.err.contains("in the cache is damaged") && again.err.contains("fetched again"), "{}", again.err);
    assert_same(&place.path("a"), &place.path("c"));
    // A pipe in its place is not waited for.
    let blob = pointer.canonicalize().unwrap();
    std::fs::remove_file(&blob).unwrap();
    let made = Command::new("mkfifo").arg(&blob).status().unwrap();
    assert!(made.success());
    let pipe = run(place.dequant(&hub, "org/model", "d").env("HF_HUB_OFFLINE", "1"));
    refused(pipe, "a device or pipe", &place.path("d"));
}
