#pragma once

#include <string>

namespace regard::bindings {

// Of the sources; where they were when they were compiled is nobody's business.
inline std::string within_sources(const std::string& file) {
  const auto at = file.rfind("csrc/");
  return at == std::string::npos ? file : file.substr(at);
}

}  // namespace regard::bindings
