// Runs a SavedModel on raw images by TensorFlow's C API: classify FOLDER IMAGES NUMBER HEIGHT WIDTH IN OUT -> a line of probabilities each.
// IN and OUT are the tensors of the signature, as saved_model_cli shows them: "serving_default_images" and "StatefulPartitionedCall:1".
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

static void check(TF_Status* status, const char* what) {
  if (TF_GetCode(status) == TF_OK) return;
  fprintf(stderr, "%s: %s\n", what, TF_Message(status));
  exit(1);
}

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const int64_t number = atoi(argv[3]), height = atoi(argv[4]), width = atoi(argv[5]);
  TF_Status* status = TF_NewStatus();
  TF_SessionOptions* options = TF_NewSessionOptions();
  TF_Graph* graph = TF_NewGraph();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status, argv[1]);

  const int64_t shape[] = {number, height, width, 3};
  const size_t bytes = number * height * width * 3;
  TF_Tensor* images = TF_AllocateTensor(TF_UINT8, shape, 4, bytes);
  FILE* file = fopen(argv[2], "rb");
  if (!file || fread(TF_TensorData(images), 1, bytes, file) != bytes) return 2;
  fclose(file);

  char* index = strchr(argv[7], ':');
  if (!index) return 2;
  *index = 0;
  TF_Output input = {TF_GraphOperationByName(graph, argv[6]), 0};
  TF_Output output = {TF_GraphOperationByName(graph, argv[7]), atoi(index + 1)};
  if (!input.oper || !output.oper) return 3;
  TF_Tensor* probabilities = NULL;
  TF_SessionRun(session, NULL, &input, &images, 1, &output, &probabilities, 1, NULL, 0, NULL, status);
  check(status, "run");

  const float* values = TF_TensorData(probabilities);
  const int64_t classes = TF_Dim(probabilities, 1);
  for (int64_t i = 0; i < number * classes; i++) printf("%.8f%c", values[i], (i + 1) % classes ? ' ' : '\n');
  TF_DeleteTensor(images);
  TF_DeleteTensor(probabilities);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteGraph(graph);
  TF_DeleteSessionOptions(options);
  TF_DeleteStatus(status);
  return 0;
}
