//! Writes a checkpoint with random weights and the shapes of gpt-oss-20b, cut to some layers and experts.
//!
//! usage: synthetic DIR [LAYERS [EXPERTS [VOCABULARY]]]   (1 layer, 32 experts, 512 tokens)

#[path = "../../tests/support/synthetic.rs"]
mod synthetic;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(dir) = args.first() else {
        eprintln!("usage: synthetic DIR [LAYERS [EXPERTS [VOCABULARY]]]");
        std::process::exit(2);
    };
    let number = |i: usize, default: usize| args.get(i).map_or(default, |a| a.parse().expect("a number"));
    let changes =
        [("num_hidden_layers", number(1, 1)), ("num_local_experts", number(2, 32)), ("vocab_size", number(3, 512))];
    synthetic::write(dir.as_ref(), &synthetic::config(&changes));
}
