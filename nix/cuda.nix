# The tools with a build of the kernels, finding the driver where NixOS has it.
{
  runCommand,
  makeWrapper,
  autoAddDriverRunpath,
  gptoss,
  kernels,
  ...
}:
runCommand "gptoss-cuda-${gptoss.version}"
  {
    nativeBuildInputs = [
      makeWrapper
      autoAddDriverRunpath
    ];
    meta.mainProgram = "gptoss-quant";
  }
  ''
    mkdir -p $out/bin
    for tool in ${gptoss}/bin/gptoss-*; do
      makeWrapper $tool $out/bin/$(basename $tool) --set-default GPTOSS_KERNELS ${kernels} \
        --suffix LD_LIBRARY_PATH : /run/opengl-driver/lib
    done
  ''
