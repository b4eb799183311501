# The tools with a build of the kernels.
{
  runCommand,
  makeWrapper,
  gptoss,
  kernels,
  ...
}:
runCommand "gptoss-cuda-${gptoss.version}"
  {
    nativeBuildInputs = [ makeWrapper ];
    meta.mainProgram = "gptoss-quant";
  }
  ''
    mkdir -p $out/bin
    for tool in ${gptoss}/bin/gptoss-*; do
      makeWrapper $tool $out/bin/$(basename $tool) --set-default GPTOSS_KERNELS ${kernels}
    done
  ''
