//! `gptoss-run` and `gptoss-bench` as a user meets them.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use support::{Ran, command, run, run_with, tiny, tiny_copy};

fn generate(model: &Path, flags: &str, prompt: &str) -> Ran {
    let mut c = command("gptoss-run");
    run(c.arg("--model").arg(model).args(support::words(flags)).arg("--prompt").arg(prompt))
}

fn json(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{}", ran.err);
    serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {}", ran.out))
}

#[test]
fn text_goes_to_stdout_and_times_to_stderr() {
    let r = generate(&tiny(), "--max-tokens 20 --temperature 0", "The function returns");
    assert_eq!(r.code, 0, "{}", r.err);
    assert!(r.out.ends_with('\n') && r.out.trim().len() > 10, "{:?}", r.out);
    assert!(r.err.contains("first token after") && r.err.contains("tokens/s") && r.err.contains("length"), "{}", r.err);
    let q = generate(&tiny(), "--max-tokens 20 --temperature 0 --quiet", "The function returns");
    assert_eq!((q.out.as_str(), q.err.as_str()), (r.out.as_str(), ""));
    // From standard input, the same.
    let mut c = command("gptoss-run --max-tokens 20 --temperature 0 --quiet --threads 1 --model");
    assert_eq!(run_with(c.arg(tiny()), "The function returns").out, r.out);
    // --json has the same text.
    let j = json(&generate(&tiny(), "--max-tokens 20 --temperature 0 --json", "The function returns"));
    assert_eq!(j["text"].as_str().unwrap(), r.out.trim_end_matches('\n'));
    assert_eq!((j["finish"].as_str(), j["tokens"].as_array().unwrap().len()), (Some("length"), 20));
}

#[test]
fn a_seed_gives_the_same_text_and_another_seed_another() {
    let text = |flags: &str| generate(&tiny(), &format!("--max-tokens 40 --quiet {flags}"), "A trait").out;
    assert_eq!(text("--seed 5 --top-k 50 --top-p 0.9"), text("--seed 5 --top-k 50 --top-p 0.9 --threads 1"));
    assert_ne!(text("--seed 5"), text("--seed 6"));
    assert_eq!(text("--top-k 1"), text("--temperature 0"));
}

#[test]
fn the_end_token_ends_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tiny_copy(dir.path());
    let greedy = json(&generate(&copy, "--max-tokens 12 --temperature 0 --json", "The function returns"));
    let tokens: Vec<u64> = greedy["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
    // The sixth token becomes the end token: the text stops where it first came.
    let end = tokens[5];
    let at = tokens.iter().position(|&t| t == end).unwrap();
    std::fs::write(copy.join("generation_config.json"), format!("{{\"eos_token_id\": [7, {end}]}}")).unwrap();
    let ended = json(&generate(&copy, "--max-tokens 12 --temperature 0 --json", "The function returns"));
    assert_eq!(ended["finish"], "eos");
    assert_eq!(ended["tokens"].as_array().unwrap().len(), at);
}

#[test]
fn a_chat_goes_through_the_checkpoints_template() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tiny_copy(dir.path());
    let r = generate(&copy, "--chat", "hi");
    assert!(r.code == 2 && r.err.contains("has no chat template"), "{}", r.err);
    let template =
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    std::fs::write(copy.join("chat_template.jinja"), template).unwrap();
    let flags = "--max-tokens 5 --temperature 0 --json";
    let mut chat = command("gptoss-run --chat --system S --prompt hi");
    let chat = json(&run(chat.arg("--model").arg(&copy).args(support::words(flags))));
    assert_eq!(chat["tokens"], json(&generate(&copy, flags, "<system>S<user>hi<a>"))["tokens"]);
}

#[test]
fn a_manifest_brings_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut quant = command("gptoss-quant --quiet --algo rtn");
    let made = run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dir.path().join("q")));
    let r = run_with(&mut command("gptoss-run --prompt fn --max-tokens 3"), &made.out);
    assert!(r.code == 0 && r.err.contains("3 new tokens"), "{}", r.err);
}

#[test]
fn bad_input_is_named() {
    let fails = |flags: &str, prompt: &str, wanted: &str| {
        let r = generate(&tiny(), flags, prompt);
        assert_eq!((r.code, r.out.as_str()), (2, ""), "{flags}: {}", r.err);
        assert!(r.err.contains(wanted), "wanted {wanted:?} in {}", r.err);
    };
    fails("", "", "the prompt is empty");
    fails("--temperature -1", "x", "--temperature is -1");
    fails("--top-p 2", "x", "--top-p is 2");
    fails("--top-k 0", "x", "--top-k is 0");
    let dir = tempfile::tempdir().unwrap();
    let copy = tiny_copy(dir.path());
    let config = std::fs::read_to_string(copy.join("config.json")).unwrap();
    let short = config.replace("\"max_position_embeddings\": 131072", "\"max_position_embeddings\": 10");
    assert_ne!(short, config);
    std::fs::write(copy.join("config.json"), short).unwrap();
    let r = generate(&copy, "", &"word ".repeat(40));
    assert!(r.code == 2 && r.err.contains("the model's context is 10"), "{}", r.err);
    // A shorter prompt runs to the end of the context.
    let j = json(&generate(&copy, "--json --temperature 0", "a b"));
    assert_eq!(j["finish"], "context", "{j}");
    assert_eq!(j["prompt_tokens"].as_u64().unwrap() + j["tokens"].as_array().unwrap().len() as u64, 11);
}

#[test]
fn what_the_checkpoint_says_about_sampling_is_taken_or_named() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tiny_copy(dir.path());
    let says = |generation: &str| {
        std::fs::write(copy.join("generation_config.json"), generation).unwrap();
        generate(&copy, "--max-tokens 8", "A trait")
    };
    for (generation, wanted) in [
        ("{\"eos_token_id\": \"<|return|>\"}", "eos_token_id is \"<|return|>\""),
        ("{\"eos_token_id\": [[2042]]}", "eos_token_id is [[2042]]"),
        ("{\"eos_token_id\": 4294969338}", "eos_token_id is 4294969338"),
        ("{\"temperature\": -3}", "generation_config.json: temperature is -3"),
        ("{\"top_p\": 7}", "generation_config.json: top_p is 7"),
    ] {
        let r = says(generation);
        assert!(r.code == 2 && r.err.contains(wanted), "{generation}: {}", r.err);
    }
    // Without do_sample the most likely token; without it in the file, config.json's eos.
    assert_eq!(says("{}").out, generate(&copy, "--max-tokens 8 --temperature 0", "A trait").out);
    let config = std::fs::read_to_string(copy.join("config.json")).unwrap();
    std::fs::write(copy.join("config.json"), config.replace("\"eos_token_id\": 2042,", "")).unwrap();
    let r = says("{}");
    assert!(r.code == 0 && r.err.contains("only --max-tokens ends the text"), "{}", r.err);
}

#[test]
fn a_full_disk_is_an_error_and_nobody_on_stderr_is_none() {
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    let mut c = command("gptoss-run --prompt x --max-tokens 5 --model");
    let r: Ran = c.arg(tiny()).stdout(full()).stderr(Stdio::piped()).output().unwrap().into();
    assert!(r.code == 2 && r.err.contains("cannot write standard output"), "{r:?}");
    for line in ["gptoss-run --prompt x --max-tokens 5 --model", "gptoss-bench decode --tokens 2 --context 2 --model"] {
        let status = command(line).arg(tiny()).stdout(Stdio::null()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{line}");
    }
    let r = run(command("gptoss-bench decode --context 99999999999999 --model").arg(tiny()));
    assert!(r.code == 2 && r.err.contains("wanted a number from 1"), "{}", r.err);
}

#[test]
fn ctrl_c_ends_cleanly() {
    let mut c = command("gptoss-run --max-tokens 1000000 --model");
    let mut child = c
        .arg(tiny())
        .args(["--prompt", "The function returns"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut some = [0u8; 8];
    out.read_exact(&mut some).expect("text comes");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("whole UTF-8 to the end");
    let status = child.wait().expect("it ends");
    let mut err = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut err).unwrap();
    assert_eq!(status.code(), Some(130), "{err}");
    assert!(rest.ends_with('\n') && err.contains("(stopped)"), "{err}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut c = command("gptoss-run --max-tokens 1000000 --model");
    let mut child =
        c.arg(tiny()).args(["--prompt", "x"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut line = Vec::new();
    BufReader::new(child.stdout.take().expect("piped")).read_until(b' ', &mut line).expect("text comes");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    std::io::stdout().flush().unwrap();
}

#[test]
fn bench_says_tokens_a_second_and_bytes_a_token() {
    let m =
        run(command("gptoss-bench decode --tokens 4 --context 4 --sweep 1,2 --quiet --model").arg(tiny())).manifest();
    let rows = m["volatile"]["bench"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["threads"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    assert!(rows.iter().all(|r| r["tokens_per_second"].as_f64().unwrap() > 1.0));
    // 4 of 16 experts, everything else once, one row of the embedding; from the shapes by hand.
    let bf16 = |n: u64| 2 * n;
    let experts = 4 * (3 * 128 * 256 * 17 / 32 + bf16(2 * 128 + 256));
    let attention = bf16(512 * 256 + 2 * 128 * 256 + 256 * 512 + 512 + 2 * 128 + 256 + 8);
    let layer = experts + attention + bf16(16 * 256 + 16 + 2 * 256);
    let want = 4 * layer + bf16(2048 * 256 + 256 + 256);
    assert_eq!(rows[0]["bytes_per_token"].as_u64().unwrap(), want);
    let m =
        run(command("gptoss-bench prefill --tokens 32 --repeat 2 --sweep 2 --quiet --model").arg(tiny())).manifest();
    assert!(m["volatile"]["bench"][0]["tokens_per_second"].as_f64().unwrap() > 10.0);
    assert_eq!(m["job"]["what"], "prefill");
}

/// What a system call of the child's shell limits: a shell that sets it, then becomes the tool.
fn limited(limit: &str, tool: &str, model: &Path) -> Ran {
    let line = format!("{limit}; exec \"$0\" \"$@\"");
    let mut c = std::process::Command::new("sh");
    c.args(["-c", &line, support::exe(tool), "--temperature", "0", "--max-tokens", "4", "--prompt", "The function"]);
    run(c.args(["--json", "--threads", "2", "--model"]).arg(model))
}

#[test]
fn a_model_twice_as_large_as_memory_may_be_still_generates() {
    let dir = tempfile::tempdir().unwrap();
    let (model, vocab) = (dir.path().join("model"), 2048);
    let config: Value = serde_json::from_slice(&std::fs::read(tiny().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["vocab_size"], vocab, "the tokenizer's");
    let shape = [("num_hidden_layers", 2), ("num_local_experts", 16), ("vocab_size", vocab)];
    support::synthetic::write(&model, &support::synthetic::config(&shape));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny().join(file), model.join(file)).unwrap();
    }
    let size = std::fs::metadata(model.join("model-00000-of-00001.safetensors")).unwrap().len();
    let free = json(&limited("true", "gptoss-run", &model));
    assert_eq!(free["tokens"].as_array().unwrap().len(), 4);
    // No copy of the weights fits into half of their size.
    let half = size / 2;
    let data = json(&limited(&format!("ulimit -d {}", half / 1024), "gptoss-run", &model));
    assert_eq!(data["tokens"], free["tokens"]);
    // Where control groups can be made, mapped pages count too: the system takes them back and reads them again.
    let files = [
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        ("/sys/fs/cgroup", "memory.max", "memory.peak"),
    ];
    let made = files.into_iter().find_map(|(at, limit, most)| {
        let group = Path::new(at).join(format!("gptoss-{}", std::process::id()));
        std::fs::create_dir(&group).ok()?;
        let set = std::fs::write(group.join(limit), half.to_string());
        set.map_err(|_| std::fs::remove_dir(&group)).ok().map(|()| (group, most))
    });
    if let Some((group, most)) = &made {
        // Pages that other processes have read are counted for them.
        let copy = support::copy_folder(&model, &dir.path().join("copy"));
        let shard = copy.join("model-00000-of-00001.safetensors");
        let drop = format!("dd of={} oflag=nocache conv=notrunc,fdatasync count=0", support::word(&shard));
        let dropped = run(std::process::Command::new("sh").args(["-c", &drop]));
        let join = format!("echo $$ > {}/cgroup.procs", support::word(group));
        let ran = limited(&join, "gptoss-run", &copy);
        let most = std::fs::read_to_string(group.join(most)).unwrap();
        std::fs::remove_dir(group).unwrap();
        assert_eq!(dropped.code, 0, "{}", dropped.err);
        assert_eq!(json(&ran)["tokens"], free["tokens"]);
        // The weights were counted for the group: else nothing would have been proved.
        assert!(most.trim().parse::<u64>().unwrap() > half / 2, "{most} of {half}");
    } else {
        println!("no control group can be made here: only private memory was limited");
    }
}

#[test]
fn numerics_are_chosen_and_recorded() {
    let text = |numerics: &str| json(&generate(&tiny(), &format!("--max-tokens 4 --json --numerics {numerics}"), "A"));
    assert_eq!(
        (text("engine")["numerics"].as_str(), text("exact")["numerics"].as_str()),
        (Some("engine"), Some("exact"))
    );
    let bench = |numerics: &str| {
        let mut c = command("gptoss-bench decode --quiet --tokens 2 --context 4 --sweep 1 --numerics");
        run(c.arg(numerics).arg("--model").arg(tiny())).manifest()
    };
    let (engine, exact) = (bench("engine"), bench("exact"));
    assert_eq!((engine["numerics"].as_str(), exact["numerics"].as_str()), (Some("cpu-engine-1"), Some("cpu-1")));
    assert!(engine["volatile"]["bench"][0]["read_gigabytes_per_second"].as_f64().unwrap() > 0.0);
    let wrong = run(command("gptoss-run --prompt x --numerics fast --model").arg(tiny()));
    assert!(wrong.code == 2 && wrong.err.contains("wanted engine or exact"), "{}", wrong.err);
}
